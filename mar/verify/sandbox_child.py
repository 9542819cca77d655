"""All that runs inside the sandbox: limits, one program, the values of some expressions.

It is handed to a fresh interpreter as text, behind that of `program_form.py`, and never imported by
`mar`; standard library only. It
holds no secret and reaches no verdict. Expected values never enter, so a program that forges the
reply must already know the right answers.

To stderr, a pipe, go `ready` and the program's key, before its first instruction: it can append
to them and never take them back. To stdout, a file, go the values as tagged JSON.
"""

import _json
import marshal
import os
import resource
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    # in the sandbox its text stands above this one
    from mar.verify.program_form import canonical

PLAIN = (list, tuple, set, frozenset, bytes, bytearray)


def tagged(value: object) -> str:
    """Plain data as JSON, containers as [kind, items]. TypeError for anything else.

    What is derived from a plain type is written as that type.
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return _json.encode_basestring_ascii(value)
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        return f'["float", "{float.__repr__(value)}"]'
    if isinstance(value, complex):
        return f'["complex", [{tagged(value.real)}, {tagged(value.imag)}]]'
    if isinstance(value, dict):
        return f'["dict", [{", ".join(map(tagged, value.items()))}]]'
    for kind in PLAIN:
        if isinstance(value, kind):
            return f'["{kind.__name__}", [{", ".join(map(tagged, value))}]]'
    raise TypeError(f"{type(value).__name__} is not plain data")


def confine(uid: int, limits: dict[str, int]) -> None:
    """Set hard limits, and change to user `uid` unless it is 0.

    The latter is for a sandbox that root made: the kernel does not count root's processes.
    """
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if uid:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)


def main() -> None:
    request = marshal.load(sys.stdin.buffer)
    program = request["program"]
    values_out = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    confine(request["uid"], request["limits"])
    os.write(2, b"ready\n")
    used = (request["setup"], *request["expressions"])
    os.write(2, canonical(program, used).encode() + b"\n")
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)

    space: dict[str, object] = {"__name__": "program"}
    # dont_inherit: without the __future__ of the text above
    exec(compile(program, "<program>", "exec", dont_inherit=True), space)
    exec(compile(request["setup"], "<setup>", "exec", dont_inherit=True), space)
    values = [tagged(eval(expression, space)) for expression in request["expressions"]]
    reply = memoryview(f"[{', '.join(values)}]".encode())
    while reply:
        reply = reply[os.write(values_out, reply) :]
    # without the program's exit hooks
    os._exit(0)


if __name__ == "__main__":
    main()
