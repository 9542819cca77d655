"""What two programs have in common that are one solution, written twice.

The text of this file runs in the sandbox, in front of `sandbox_child.py`, before the program does;
so it is standard library only and imports little. Both directions of an error are cheap here but
one: a rewrite that passes for another solution is paid again. So where it is unclear whether two
programs differ, they do not.

    dead code         what is never reached, never used, or changes nothing is gone
    copies            y = x, and a value that is used once, in the next statement, stand in place
    helpers           a function that returns an expression, and one that only calls another, too
    one spelling      sums, comparisons, loops over a range, ways to say the same value
    order             independent statements and the parts of a sum are sorted
    names             are numbered in the order in which they then come
"""

from __future__ import annotations

import _ast
from _blake2 import blake2b
from collections.abc import Iterator

TYPE_CHECKING = False
if TYPE_CHECKING:
    # importing it takes longer than all else here
    from typing import Any

Names = dict[str, str]

# fields of a syntax tree that change nothing
IDLE_FIELDS = ("annotation", "returns", "asname", "type_comment", "kind", "ctx", "type_params")

FUNCTIONS = (_ast.FunctionDef, _ast.AsyncFunctionDef)
# statements that bind a name
DEFINITIONS = (*FUNCTIONS, _ast.ClassDef)
IMPORTS = (_ast.Import, _ast.ImportFrom)
JUMPS = (_ast.Return, _ast.Raise, _ast.Break, _ast.Continue)
LOOPS = (_ast.For, _ast.AsyncFor, _ast.While)
DISPLAYS = (_ast.List, _ast.Dict, _ast.Set, _ast.ListComp, _ast.DictComp, _ast.SetComp)
# statements whose head is not evaluated exactly once
EVALUATED_AGAIN = (*DEFINITIONS, _ast.While)
# what runs its names later, more than once, or never
DEFERRED = (_ast.Lambda, _ast.ListComp, _ast.SetComp, _ast.DictComp, _ast.GeneratorExp)
EFFECTS = (*JUMPS, _ast.Yield, _ast.YieldFrom, _ast.Await, _ast.Delete, _ast.NamedExpr)
NOT_PURE = (*EFFECTS, _ast.Call)

# their calls change nothing that a test can see
HARMLESS = frozenset(
    "abs all any bool bytes chr dict divmod enumerate filter float frozenset hash id int isinstance "
    "len list map max min ord pow print range repr reversed round set sorted str sum tuple type zip".split()
)

# operators whose sides can change places
COMMUTE = (_ast.Add, _ast.Mult, _ast.BitOr, _ast.BitAnd, _ast.BitXor)

# decorators that change nothing but the time that a call takes
CACHES = frozenset("cache lru_cache wraps njit jit".split())

# calls that hand on their only argument, where the loop takes it
SAME_ITEMS = frozenset("list tuple iter".split())

MIRRORED = {_ast.Gt: _ast.Lt, _ast.GtE: _ast.LtE}
NEGATED = {
    _ast.Eq: _ast.NotEq,
    _ast.NotEq: _ast.Eq,
    _ast.Is: _ast.IsNot,
    _ast.IsNot: _ast.Is,
    _ast.In: _ast.NotIn,
    _ast.NotIn: _ast.In,
}

# statements of which a named value can be taken out, to stand before them
HOISTED = (_ast.Assign, _ast.Return, _ast.Expr, _ast.If, _ast.For, _ast.AugAssign)

# nodes of an expression that may stand wherever its name did
SMALL = 6

# nodes of an expression that stands in the place of a call
LARGEST_INLINED = 60

# simplifying ends earlier; a program that would go on is compared as it then is
MAX_ROUNDS = 12


def walk(node: object) -> Iterator[Any]:
    """Every node of a syntax tree, or of a list of them, parents first."""
    waiting = [node]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part[::-1]
        elif isinstance(part, _ast.AST):
            yield part
            waiting += [getattr(part, field, None) for field in part._fields[::-1]]


def loads(node: object) -> list[str]:
    """Every name that is read, as often as it is."""
    return [
        part.id
        for part in walk(node)
        if isinstance(part, _ast.Name) and not isinstance(part.ctx, _ast.Store)
    ]


def bindings(node: object) -> list[str]:
    """Every name that is bound, as often as it is."""
    found = []
    for part in walk(node):
        if isinstance(part, _ast.Name):
            if isinstance(part.ctx, _ast.Store):
                found.append(part.id)
        elif isinstance(part, _ast.arg):
            found.append(part.arg)
        elif isinstance(part, _ast.alias):
            found.append((part.asname or part.name).split(".")[0])
        elif (
            isinstance(part, DEFINITIONS)
            or isinstance(part, (_ast.ExceptHandler, _ast.MatchAs, _ast.MatchStar))
            and part.name
        ):
            found.append(part.name or "")
        elif isinstance(part, (_ast.Global, _ast.Nonlocal)):
            # more than once: neither copied nor dropped
            found += [*part.names, *part.names]
    return found


def is_harmless_call(node: Any) -> bool:
    return (
        isinstance(node, _ast.Call)
        and isinstance(node.func, _ast.Name)
        and node.func.id in HARMLESS
    )


def is_pure(node: object) -> bool:
    """An expression whose value is all that it gives."""
    return all(is_harmless_call(p) or not isinstance(p, NOT_PURE) for p in walk(node))


def same(a: object, b: object) -> bool:
    return text(a, {}) == text(b, {})


# --- expressions ---------------------------------------------------------------------------------


def simple_expression(node: Any) -> Any:
    """One way to write an expression whose parts are simple already."""
    if isinstance(node, _ast.UnaryOp):
        return _simple_unary(node)
    if isinstance(node, _ast.Compare) and len(node.ops) == 1:
        return _simple_comparison(node)
    if isinstance(node, _ast.BoolOp):
        return _simple_bool(node)
    if isinstance(node, _ast.Subscript):
        return _simple_subscript(node)
    if isinstance(node, _ast.BinOp):
        return _simple_binary(node)
    if isinstance(node, _ast.IfExp):
        return _simple_choice(node)
    if isinstance(node, _ast.Call):
        return _simple_call(node)
    return node


def _constant(value: Any) -> Any:
    return _ast.Constant(value=value)


def _is_constant(node: object, *values: object) -> bool:
    """A constant, of these values if there are any. (True is 1.)"""
    return isinstance(node, _ast.Constant) and (not values or node.value in values)


def _is_int(node: object) -> bool:
    return isinstance(node, _ast.Constant) and type(node.value) is int


def _simple_comparison(node: Any) -> Any:
    mirrored = MIRRORED.get(type(node.ops[0]))
    if mirrored:
        # a > b is b < a
        node.left, node.comparators = node.comparators[0], [node.left]
        node.ops = [mirrored()]
    left, (right,) = node.left, node.comparators
    if isinstance(node.ops[0], _ast.LtE):
        # of whole numbers, a <= b is a < b + 1
        right = simple_expression(_ast.BinOp(left=right, op=_ast.Add(), right=_constant(1)))
        node.ops, node.comparators = [_ast.Lt()], [right]
    if _is_int(left) and _is_int(right):
        results = {
            _ast.Lt: left.value < right.value,
            _ast.Eq: left.value == right.value,
            _ast.NotEq: left.value != right.value,
        }
        result = results.get(type(node.ops[0]))
        return node if result is None else _constant(result)
    if same(left, right) and is_pure(left) and isinstance(node.ops[0], (_ast.Eq, _ast.NotEq)):
        return _constant(isinstance(node.ops[0], _ast.Eq))
    return node


def _simple_bool(node: Any) -> Any:
    """`and` and `or` without the parts that do not matter."""
    decides = isinstance(node.op, _ast.Or)
    kept: list = []
    for part in node.values:
        if _is_constant(part) and bool(part.value) != decides:
            continue
        if kept and same(kept[-1], part) and is_pure(part):
            continue
        kept.append(part)
        if _is_constant(part):
            break
    if not kept:
        return node.values[-1]
    if _is_constant(kept[-1]) and all(is_pure(part) for part in kept):
        # nothing and False: whatever stands before
        return kept[-1]
    node.values = kept
    return kept[0] if len(kept) == 1 else node


def _simple_choice(node: Any) -> Any:
    """`a if test else b`"""
    if _is_constant(node.test):
        return node.body if node.test.value else node.orelse
    if same(node.body, node.orelse) and is_pure(node.test):
        return node.body
    if isinstance(node.test, _ast.UnaryOp) and isinstance(node.test.op, _ast.Not):
        node.test, node.body, node.orelse = node.test.operand, node.orelse, node.body
    return node


def _simple_subscript(node: Any) -> Any:
    """`[a, b][0]` is a, and `divmod(a, b)[0]` is a // b."""
    inner, index = node.value, node.slice
    if not _is_int(index) or isinstance(node.ctx, (_ast.Store, _ast.Del)):
        return node
    is_display = isinstance(inner, (_ast.List, _ast.Tuple)) and is_pure(inner)
    if is_display and -len(inner.elts) <= index.value < len(inner.elts):
        return inner.elts[index.value]
    is_divmod = is_harmless_call(inner) and inner.func.id == "divmod" and len(inner.args) == 2
    if is_divmod and index.value in (0, 1):
        operator = _ast.Mod() if index.value else _ast.FloorDiv()
        return _ast.BinOp(left=inner.args[0], op=operator, right=inner.args[1])
    return node


def _simple_call(node: Any) -> Any:
    if isinstance(node.func, _ast.Lambda):
        # (lambda x: x + 1)(2) is 2 + 1
        return _inlined(node, node.func.args, node.func.body) or node
    if not isinstance(node.func, _ast.Name) or node.keywords or not node.args:
        return node
    name, arguments = node.func.id, node.args
    first = arguments[0]
    of_truth = _is_constant(first) and type(first.value) in (bool, int)
    if name in ("bool", "int") and len(arguments) == 1 and of_truth:
        return _constant(bool(first.value) if name == "bool" else int(first.value))
    if name == "int" and len(arguments) == 1 and not isinstance(first, _ast.Starred):
        return first
    if name in ("max", "min") and len(arguments) == 2 and same(*arguments) and is_pure(first):
        return first
    if name in ("sum", "max", "min") and len(arguments) == 1:
        if not isinstance(first, (_ast.List, _ast.Tuple)) or not first.elts:
            return node
        if any(isinstance(part, _ast.Starred) for part in first.elts):
            return node
        total = first.elts[0]
        for part in first.elts[1:] if name == "sum" else []:
            total = _ast.BinOp(left=total, op=_ast.Add(), right=part)
        return simple_expression(total) if name == "sum" or len(first.elts) == 1 else node
    if name == "range" and len(arguments) == 3 and _is_constant(arguments[2], 1):
        del arguments[2]
    if name == "range" and len(arguments) == 2 and _is_constant(first, 0):
        del arguments[0]
    return node


def copied(node: Any) -> Any:
    """A syntax tree of its own, equal to this one."""
    if isinstance(node, list):
        return [copied(part) for part in node]
    if not isinstance(node, _ast.AST):
        return node
    return type(node)(**{field: copied(getattr(node, field, None)) for field in node._fields})


def _inlined(call: Any, parameters: Any, value: Any) -> Any:
    """The value of a function of one expression, called so; None where it is not plain."""
    names = plain_parameters(parameters)
    if names is None or call.keywords or len(call.args) != len(names):
        return None
    if any(isinstance(part, (_ast.Starred, _ast.NamedExpr)) for part in walk(call.args)):
        return None
    used = loads(value)
    for name, argument in zip(names, call.args, strict=True):
        if used.count(name) > 1 and not is_pure(argument):
            return None
    # a parameter may have the name of something in an argument
    inner = copied(value)
    for number, name in enumerate(names):
        _rename(inner, name, f" {number}")
    holder = [inner]
    for number, argument in enumerate(call.args):
        _replace(holder, f" {number}", argument)
    return simplify(holder[0])


def plain_parameters(parameters: Any) -> list[str] | None:
    """The names of parameters that are all given by position; None where there are others."""
    others = (
        parameters.vararg,
        parameters.kwarg,
        *parameters.kwonlyargs,
        *parameters.defaults,
    )
    if any(other is not None for other in others):
        return None
    return [one.arg for one in (*parameters.posonlyargs, *parameters.args)]


def _rename(node: object, name: str, other: str) -> None:
    for part in walk(node):
        if isinstance(part, _ast.Name) and part.id == name:
            part.id = other


def _simple_unary(node: Any) -> Any:
    inner = node.operand
    if isinstance(node.op, _ast.UAdd):
        return inner
    if isinstance(node.op, _ast.USub):
        if isinstance(inner, _ast.Constant) and isinstance(inner.value, int | float):
            return _ast.Constant(value=-inner.value)
        if isinstance(inner, _ast.UnaryOp) and isinstance(inner.op, _ast.USub):
            return inner.operand
    if isinstance(node.op, _ast.Not):
        if isinstance(inner, _ast.Constant):
            return _ast.Constant(value=not inner.value)
        if isinstance(inner, _ast.UnaryOp) and isinstance(inner.op, _ast.Not):
            # where only its truth matters, as nearly everywhere
            return inner.operand
        is_comparison = isinstance(inner, _ast.Compare) and len(inner.ops) == 1
        if is_comparison and isinstance(inner.ops[0], _ast.Lt):
            # not a < b is b <= a
            sides = [inner.left]
            turned = _ast.Compare(left=inner.comparators[0], ops=[_ast.LtE()], comparators=sides)
            return _simple_comparison(turned)
        if isinstance(inner, _ast.Compare) and len(inner.ops) == 1:
            negated = NEGATED.get(type(inner.ops[0]))
            if negated:
                inner.ops = [negated()]
                return inner
    return node


def _simple_binary(node: Any) -> Any:
    """Sums, products and divisions, for the other ways to write them."""
    for rule in (_without_shift, _without_difference, _without_square, _without_one):
        simpler = rule(node)
        if simpler is not None:
            return simpler
    if isinstance(node.op, (_ast.Add, _ast.Mult)):
        return _simple_chain(node)
    return node


def _without_shift(node: Any) -> Any:
    """a << 3 is a * 8, and a >> 3 is a // 8. None: it is no shift by a small number."""
    is_shift = isinstance(node.op, (_ast.RShift, _ast.LShift))
    if not (is_shift and _is_int(node.right) and 0 <= node.right.value < 64):
        return None
    operator = _ast.FloorDiv() if isinstance(node.op, _ast.RShift) else _ast.Mult()
    power = _constant(1 << node.right.value)
    return simple_expression(_ast.BinOp(left=node.left, op=operator, right=power))


def _without_difference(node: Any) -> Any:
    """a - b is a + -b. None: it is no difference."""
    if not isinstance(node.op, _ast.Sub):
        return None
    negative = simple_expression(_ast.UnaryOp(op=_ast.USub(), operand=node.right))
    return simple_expression(_ast.BinOp(left=node.left, op=_ast.Add(), right=negative))


def _without_square(node: Any) -> Any:
    """a ** 2 is a * a. None: it is no square, or a does more than name a value."""
    is_square = isinstance(node.op, _ast.Pow) and _is_constant(node.right, 2)
    if not (is_square and is_pure(node.left)):
        return None
    product = _ast.BinOp(left=node.left, op=_ast.Mult(), right=copied(node.left))
    return simple_expression(product)


def _without_one(node: Any) -> Any:
    """a ** 1 and a // 1 are a. None: it is neither."""
    by_one = _is_int(node.right) and node.right.value == 1
    return node.left if by_one and isinstance(node.op, (_ast.Pow, _ast.FloorDiv)) else None


def parts_of(node: Any, operator: type) -> list:
    """The parts of a sum of sums, or of another chain of one operator."""
    if isinstance(node, _ast.BinOp) and isinstance(node.op, operator):
        return parts_of(node.left, operator) + parts_of(node.right, operator)
    return [node]


def _simple_chain(node: Any) -> Any:
    """A sum or a product whose whole numbers are one, at its end."""
    is_sum = isinstance(node.op, _ast.Add)
    parts = parts_of(node, type(node.op))
    number = 0 if is_sum else 1
    others = []
    for part in parts:
        if _is_int(part) and abs(part.value) < 1 << 32:
            number = number + part.value if is_sum else number * part.value
        else:
            others.append(part)
    if not others:
        return _constant(number)
    if number != (0 if is_sum else 1):
        others.append(_constant(number))
    chain = others[0]
    for part in others[1:]:
        chain = _ast.BinOp(left=chain, op=node.op, right=part)
    return chain


def simplify(node: object) -> object:
    """Expressions and blocks from the inside out."""
    if isinstance(node, list):
        parts = [simplify(part) for part in node]
        if parts and all(isinstance(part, _ast.stmt) for part in parts):
            return block(parts)
        return parts
    if not isinstance(node, _ast.AST):
        return node
    for field in node._fields:
        value = getattr(node, field, None)
        if value is not None:
            setattr(node, field, simplify(value))
    return simple_expression(node)


# --- blocks --------------------------------------------------------------------------------------


def block(statements: list) -> list:
    """A block without what is never reached or changes nothing."""
    found: list = []
    for statement in statements:
        for part in simple_statement(statement):
            found.append(part)
            if isinstance(part, JUMPS):
                return _flat(found)
    return _flat(found)


def _ends(statements: list) -> bool:
    """Nothing behind them is reached."""
    if not statements:
        return False
    last = statements[-1]
    if isinstance(last, _ast.If):
        return _ends(last.body) and _ends(last.orelse)
    return isinstance(last, JUMPS)


def _flat(statements: list) -> list:
    """`if c: return a` and what follows, for an `else` behind a branch that ends."""
    found: list = []
    for statement in statements:
        found.append(statement)
        if isinstance(statement, _ast.If) and statement.orelse and _ends(statement.body):
            found += statement.orelse
            statement.orelse = []
        if _ends(found):
            break
    return found


def simple_statement(node: Any) -> list:
    """What stands for a statement whose parts are simple already."""
    if isinstance(node, _ast.Pass):
        return []
    if isinstance(node, _ast.Delete):
        kept = [target for target in node.targets if not isinstance(target, _ast.Name)]
        return [_ast.Delete(targets=kept)] if kept else []
    if isinstance(node, (_ast.Return, _ast.Assign)) and isinstance(node.value, _ast.IfExp):
        return _chosen(node)
    if isinstance(node, HOISTED):
        named = _named_first(node)
        if named is not None:
            name, value = named.target, named.value
            return [_ast.Assign(targets=[name], value=value), *simple_statement(node)]
    if isinstance(node, _ast.Expr):
        function = getattr(node.value, "func", None)
        on_display = isinstance(function, _ast.Attribute) and isinstance(function.value, DISPLAYS)
        return [] if is_pure(node.value) or on_display else [node]
    if isinstance(node, _ast.Assert):
        return [] if isinstance(node.test, _ast.Constant) and node.test.value else [node]
    if isinstance(node, _ast.AnnAssign):
        if node.value is None:
            return []
        return [_ast.Assign(targets=[node.target], value=node.value)]
    if isinstance(node, _ast.AugAssign) and isinstance(node.target, _ast.Name):
        before = _ast.Name(id=node.target.id, ctx=_ast.Load())
        value = simple_expression(_ast.BinOp(left=before, op=node.op, right=node.value))
        return simple_statement(_ast.Assign(targets=[node.target], value=value))
    if isinstance(node, _ast.Assign):
        return _simple_assignment(node)
    if isinstance(node, _ast.If):
        return _simple_if(node)
    if (
        isinstance(node, _ast.While)
        and isinstance(node.test, _ast.Constant)
        and not node.test.value
    ):
        return node.orelse
    if isinstance(node, LOOPS):
        while node.body and isinstance(node.body[-1], _ast.Continue):
            node.body.pop()
    if isinstance(node, _ast.While) and _is_constant(node.test) and not node.orelse and node.body:
        first: Any = node.body[0]
        leaves = isinstance(first, _ast.If) and len(first.body) == 1 and not first.orelse
        if leaves and isinstance(first.body[0], _ast.Break):
            # while True: if c: break
            goes_on = simple_expression(_ast.UnaryOp(op=_ast.Not(), operand=first.test))
            return [_ast.While(test=goes_on, body=node.body[1:], orelse=[])]
    if isinstance(node, _ast.While) and isinstance(node.test, _ast.Constant) and _ends(node.body):
        # `while True: return x` is left in its first round
        leaves = any(isinstance(part, (_ast.Break, _ast.Continue)) for part in walk(node.body))
        return [node] if leaves else node.body
    if isinstance(node, (_ast.For, _ast.While)) and not node.body and not node.orelse:
        head = node.iter if isinstance(node, _ast.For) else node.test
        return [] if isinstance(node, _ast.For) and is_pure(head) else [node]
    if isinstance(node, _ast.For) and _runs_once(node):
        return [*node.body, *node.orelse]
    if isinstance(node, _ast.For):
        return _simple_for(node)
    if isinstance(node, (_ast.With, _ast.AsyncWith)):
        idle = all("nullcontext" in text(item.context_expr, {}) for item in node.items)
        bound = any(item.optional_vars for item in node.items)
        return node.body if idle and not bound else [node]
    if isinstance(node, _ast.Match):
        empty = not any(case.body or case.guard for case in node.cases)
        return [] if empty and is_pure(node.subject) else [node]
    if isinstance(node, _ast.Try):
        return _simple_try(node)
    return [node]


def _simple_assignment(node: Any) -> list:
    if len(node.targets) > 1 and is_pure(node.value):
        return [_ast.Assign(targets=[target], value=node.value) for target in node.targets]
    target = node.targets[0]
    if isinstance(target, _ast.Subscript) and isinstance(target.value, DISPLAYS):
        # {}["x"] = 1
        return []
    if isinstance(target, _ast.Name) and same(target, node.value):
        # x = x
        return []
    both = isinstance(target, _ast.Tuple) and isinstance(node.value, _ast.Tuple)
    if both and len(target.elts) == len(node.value.elts):
        independent = not set(bindings(target)) & set(loads(node.value))
        starred = any(isinstance(part, _ast.Starred) for part in walk(node))
        if independent and not starred:
            pairs = zip(target.elts, node.value.elts, strict=True)
            return [_ast.Assign(targets=[name], value=value) for name, value in pairs]
    return [node]


def _simple_if(node: Any) -> list:
    if isinstance(node.test, _ast.Constant):
        return node.body if node.test.value else node.orelse
    while isinstance(node.test, _ast.UnaryOp) and isinstance(node.test.op, _ast.Not):
        inner = node.test.operand
        if node.orelse:
            node.body, node.orelse = node.orelse, node.body
        elif not (isinstance(inner, _ast.UnaryOp) and isinstance(inner.op, _ast.Not)):
            break
        else:
            inner = inner.operand
        node.test = inner
    if same(node.body, node.orelse) and is_pure(node.test):
        return node.body
    if not node.body and node.orelse:
        negated = simple_expression(_ast.UnaryOp(op=_ast.Not(), operand=node.test))
        node.test, node.body, node.orelse = negated, node.orelse, []
    return [node] if node.body else []


def _runs_once(node: Any) -> bool:
    call = node.iter
    once = is_harmless_call(call) and call.func.id == "range" and len(call.args) == 1
    if not once or not isinstance(call.args[0], _ast.Constant) or call.args[0].value != 1:
        return False
    leaves = any(isinstance(part, (_ast.Break, _ast.Continue)) for part in walk(node.body))
    return not leaves and not set(bindings(node.target)) & set(loads(node.body))


def _chosen(node: Any) -> list:
    """`return a if c else b` as two statements, and so for what is assigned."""
    choice = node.value
    other = copied(node)
    node.value, other.value = choice.body, choice.orelse
    branch = _ast.If(test=choice.test, body=simple_statement(node), orelse=simple_statement(other))
    return _simple_if(branch)


def _named_first(node: Any) -> Any:
    """The `name := value` in what a statement evaluates at once, taken out; None: there is none."""
    for part in walk(_head(node)):
        if isinstance(part, (*DEFERRED, _ast.BoolOp, _ast.IfExp)):
            return None
    for part in (node, *walk(_head(node))):
        for field in part._fields:
            inner = getattr(part, field, None)
            if isinstance(inner, _ast.NamedExpr) and field not in ("body", "orelse"):
                setattr(part, field, _ast.Name(id=inner.target.id, ctx=_ast.Load()))
                return inner
            if isinstance(inner, list) and field in ("args", "elts", "comparators"):
                for place, item in enumerate(inner):
                    if isinstance(item, _ast.NamedExpr):
                        inner[place] = _ast.Name(id=item.target.id, ctx=_ast.Load())
                        return item
    return None


def _simple_for(node: Any) -> list:
    call = node.iter
    if is_harmless_call(call) and call.func.id in SAME_ITEMS and len(call.args) == 1:
        node.iter = call = call.args[0]
    pair = node.target.elts if isinstance(node.target, _ast.Tuple) else []
    counts = is_harmless_call(call) and call.func.id == "enumerate" and len(pair) == 2
    count = pair[0] if counts else None
    if isinstance(count, _ast.Name) and count.id not in loads([node.body, node.orelse]):
        node.target = pair[1]
        node.iter = call.args[0]
        return _simple_for(node)
    leaves = any(isinstance(part, (_ast.Break, _ast.Continue)) for part in walk(node.body))
    single = isinstance(call, (_ast.List, _ast.Tuple)) and len(call.elts) == 1
    if single and not leaves and isinstance(node.target, _ast.Name):
        return [_ast.Assign(targets=[node.target], value=call.elts[0]), *node.body, *node.orelse]
    return _counting(node)


def _counting(node: Any) -> list:
    """`for i in range(a, b)` as the loop that counts: i = a; while i < b: ...; i += 1."""
    call = node.iter
    is_range = is_harmless_call(call) and call.func.id == "range" and not call.keywords
    goes_on = any(isinstance(part, _ast.Continue) for part in walk(node.body))
    if not is_range or goes_on or node.orelse or not isinstance(node.target, _ast.Name):
        return [node]
    if not 1 <= len(call.args) <= 2 or node.target.id in bindings(node.body):
        return [node]
    start, stop = [_constant(0), *call.args][-2:]
    name = node.target.id
    if not is_pure(stop):
        return [node]
    read = _ast.Name(id=name, ctx=_ast.Load())
    more = _ast.BinOp(left=read, op=_ast.Add(), right=_constant(1))
    again = _ast.Assign(targets=[_ast.Name(id=name, ctx=_ast.Store())], value=more)
    test = _simple_comparison(_ast.Compare(left=copied(read), ops=[_ast.Lt()], comparators=[stop]))
    begin = _ast.Assign(targets=[node.target], value=start)
    return [begin, _ast.While(test=test, body=[*node.body, again], orelse=[])]


def _raises_again(handler: Any) -> bool:
    """`except: raise`, or `except E as e: raise e`"""
    if len(handler.body) != 1 or not isinstance(handler.body[0], _ast.Raise):
        return False
    raised = handler.body[0].exc
    if isinstance(raised, _ast.Name):
        return raised.id == handler.name
    return raised is None


def _simple_try(node: Any) -> list:
    raises_again = all(_raises_again(handler) for handler in node.handlers)
    if raises_again and not node.finalbody:
        return [*node.body, *node.orelse]
    return [node] if node.body or node.finalbody else []


# --- names ---------------------------------------------------------------------------------------


def scopes(tree: Any) -> list:
    """The module, and every function in it."""
    return [tree, *(node for node in walk(tree.body) if isinstance(node, FUNCTIONS))]


def blocks_of(scope: Any) -> Iterator[list]:
    """Every block of statements of a scope, without those of functions in it."""
    for part in (scope, *walk(scope.body)):
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(part, field, None)
            if isinstance(statements, list):
                yield statements


def drop_unused(scope: Any, wanted: frozenset[str]) -> bool:
    """Take out what binds names that nobody reads. True: something went."""
    kept = wanted if isinstance(scope, _ast.Module) else frozenset()
    outside = frozenset(
        name
        for part in walk(scope)
        if isinstance(part, (_ast.Global, _ast.Nonlocal))
        for name in part.names
    )
    changed = False
    for statements in blocks_of(scope):
        for statement in list(statements):
            bound = set(_binds_only(statement))
            if not bound or bound & kept or bound & outside:
                continue
            if not bound & _loads_outside(scope.body, statement):
                statements.remove(statement)
                changed = True
    return changed


def _binds_only(statement: Any) -> list[str]:
    """The names that a statement binds, where it does nothing else; else none."""
    if isinstance(statement, DEFINITIONS):
        # a decorator may do anything
        return [] if statement.decorator_list else [statement.name]
    if isinstance(statement, IMPORTS):
        return bindings(statement)
    if isinstance(statement, _ast.Assign):
        changes_an_object = any(map(_is_part_of_an_object, statement.targets))
        idle = is_pure(statement.value) and not changes_an_object
        return bindings(statement.targets) if idle else []
    if isinstance(statement, (_ast.For, _ast.While, _ast.If)):
        inside = [*statement.body, *statement.orelse]
        idle = all(isinstance(part, _ast.Pass) or _binds_only(part) for part in inside)
        return bindings(statement) if idle and is_pure(_head(statement)) else []
    return []


def _is_part_of_an_object(target: Any) -> bool:
    """What is assigned to is no name: a.b or a[i], alone or among several; or a list of names."""
    if not isinstance(target, (_ast.Name, _ast.Tuple)):
        return True
    return any(isinstance(part, (_ast.Attribute, _ast.Subscript)) for part in walk(target))


def _loads_outside(body: list, statement: Any) -> set[str]:
    """The names that are read in a body, without what one statement reads of itself."""
    found: set[str] = set()
    stack: list = list(body)
    while stack:
        node = stack.pop()
        if node is statement:
            # x = x + 1 in a loop is read by nobody else
            continue
        if isinstance(node, list):
            stack += node
        elif isinstance(node, _ast.AST):
            if isinstance(node, _ast.Name) and not isinstance(node.ctx, _ast.Store):
                found.add(node.id)
            stack += [getattr(node, field, None) for field in node._fields]
    return found


def drop_overwritten(scope: Any) -> bool:
    """Take out assignments whose value is replaced before anybody reads it."""
    changed = False
    for statements in blocks_of(scope):
        for place in range(len(statements) - 1, -1, -1):
            name = _assigned(statements[place])
            pure = bool(name) and is_pure(statements[place].value)
            if pure and _is_overwritten(name, statements[place + 1 :]):
                del statements[place]
                changed = True
    return changed


def _assigned(statement: Any) -> str:
    """The name of `name = value`."""
    if isinstance(statement, _ast.Assign) and isinstance(statement.targets[0], _ast.Name):
        return statement.targets[0].id
    return ""


def _is_overwritten(name: str, following: list) -> bool:
    for statement in following:
        if name in loads(statement):
            return False
        if _assigned(statement) == name:
            return True
        if any(isinstance(part, (*JUMPS, *DEFINITIONS)) for part in walk(statement)):
            return False
    return False


def copy_values(scope: Any, wanted: frozenset[str]) -> bool:
    """Put values in the place of names: copies, constants, what the next statement alone uses."""
    counts: dict[str, int] = {}
    for name in bindings(scope.args) if isinstance(scope, FUNCTIONS) else []:
        counts[name] = counts.get(name, 0) + 1
    for name in bindings(scope.body):
        counts[name] = counts.get(name, 0) + 1
    kept = wanted if isinstance(scope, _ast.Module) else frozenset()
    for statements in blocks_of(scope):
        for place, statement in enumerate(statements):
            name = _assigned(statement)
            if not name or name in kept or counts.get(name) != 1:
                continue
            value = statement.value
            is_copy = isinstance(value, _ast.Name) and counts.get(value.id, 0) <= 1
            number_of_loads = loads(scope.body).count(name)
            if is_copy or isinstance(value, _ast.Constant):
                _replace(scope.body, name, value)
                del statements[place]
                return True
            stable = _is_stable(value, counts)
            if stable and (number_of_loads == 1 or len(list(walk(value))) <= SMALL):
                _replace(scope.body, name, value)
                del statements[place]
                return True
            following = statements[place + 1 : place + 2]
            once = [part for part in following if not isinstance(part, EVALUATED_AGAIN)]
            heads = [_head(part) for part in once]
            if number_of_loads == 1 and name in loads(heads) and not _is_deferred(heads, name):
                _replace(following, name, value)
                del statements[place]
                return True
    return False


def _is_stable(value: object, counts: dict[str, int]) -> bool:
    """Arithmetic of constants and of names that never change: the same wherever it stands."""
    parts = (_ast.BinOp, _ast.UnaryOp, _ast.Name, _ast.Constant, _ast.operator, _ast.unaryop)
    return all(
        isinstance(part, (*parts, _ast.Load))
        and (not isinstance(part, _ast.Name) or counts.get(part.id, 0) <= 1)
        for part in walk(value)
    )


def _head(statement: Any) -> list:
    """What a statement evaluates, without the blocks in it."""
    return [
        getattr(statement, field, None)
        for field in statement._fields
        if field not in ("body", "orelse", "finalbody", "handlers")
    ]


def _is_deferred(nodes: list, name: str) -> bool:
    return any(name in loads(part) for part in walk(nodes) if isinstance(part, DEFERRED))


def _replace(node: Any, name: str, value: Any) -> None:
    """Put a value, a copy of it each time, in the place of every reading of a name."""
    if isinstance(node, list):
        node[:] = [copied(value) if _reads(item, name) else item for item in node]
    for part in list(walk(node)):
        for field in part._fields:
            inner = getattr(part, field, None)
            if isinstance(inner, list):
                inner[:] = [copied(value) if _reads(item, name) else item for item in inner]
            elif _reads(inner, name):
                setattr(part, field, copied(value))


def _reads(node: object, name: str) -> bool:
    if not isinstance(node, _ast.Name) or isinstance(node.ctx, _ast.Store):
        return False
    return node.id == name


# --- order ---------------------------------------------------------------------------------------


def sort_independent(statements: list, colours: Names) -> list:
    """The statements in an order that depends on what they do, and not on how they stood."""
    touched = [_touched(statement) for statement in statements]
    keys = [text(statement, colours) for statement in statements]
    waiting = list(range(len(statements)))
    found = []
    while waiting:
        free = [i for i in waiting if not any(_before(touched, j, i) for j in waiting if j < i)]
        first = min(free, key=lambda i: (keys[i], i))
        waiting.remove(first)
        found.append(statements[first])
    return found


Touched = tuple[set[str], set[str], bool]


def _touched(statement: Any) -> Touched:
    """The names that a statement reads, those that it may change, and whether it leaves."""
    if isinstance(statement, DEFINITIONS):
        heads = [statement.decorator_list, getattr(statement, "args", None)]
        return set(loads(heads)), {statement.name}, False
    reads = set(loads(statement))
    changes = set(bindings(statement))
    for part in walk(statement):
        stores = isinstance(getattr(part, "ctx", None), (_ast.Store, _ast.Del))
        if isinstance(part, (_ast.Attribute, _ast.Subscript)) and stores:
            changes |= set(loads(part.value))
        elif isinstance(part, _ast.Call) and not is_harmless_call(part):
            # a method changes its object, a function what it is given
            method = isinstance(part.func, _ast.Attribute)
            changes |= set(loads(part.func if method else part))
    leaves = any(isinstance(part, EFFECTS) for part in walk(statement))
    return reads, changes, leaves


def _before(touched: list[Touched], first: int, second: int) -> bool:
    """Whether the order of two statements matters."""
    reads_a, changes_a, leaves_a = touched[first]
    reads_b, changes_b, leaves_b = touched[second]
    shared = changes_a & (reads_b | changes_b) or reads_a & changes_b
    return bool(shared) or leaves_a or leaves_b


def colours_of(tree: Any, rounds: int = 3) -> Names:
    """What tells names apart without their spelling: the places in which they stand."""
    bound = set(bindings(tree))
    colours = dict.fromkeys(bound, "v")
    units = [part for part in walk(tree) if isinstance(part, (_ast.stmt, _ast.arguments))]
    for _ in range(rounds):
        places: dict[str, list[str]] = {name: [] for name in bound}
        for unit in units:
            head = unit.args if isinstance(unit, _ast.arguments) else _own(unit)
            for name in {*bindings(head), *loads(head)} & bound:
                # its places in there are marked
                said = text(head, {**colours, name: "*"})
                places[name].append(f"{type(unit).__name__} {said}")
        colours = {name: digest("\n".join(sorted(found)))[:12] for name, found in places.items()}
    return colours


def _own(statement: Any) -> list:
    """A statement without the blocks in it."""
    return [
        getattr(statement, field, None)
        for field in statement._fields
        if field not in ("body", "orelse", "finalbody", "handlers", "args")
    ]


# --- text ----------------------------------------------------------------------------------------


def text(node: object, names: Names) -> str:
    """A syntax tree as text, with other names."""
    if isinstance(node, list):
        return "[" + ",".join(text(part, names) for part in node) + "]"
    if not isinstance(node, _ast.AST):
        return repr(node)
    found = type(node).__name__
    unordered = _unordered_parts(node)
    if unordered:
        return found + " " + ",".join(sorted(text(part, names) for part in unordered))
    for field in node._fields:
        if field in IDLE_FIELDS:
            continue
        value = getattr(node, field, None)
        if field in ("name", "arg", "id") and not isinstance(node, (_ast.alias, _ast.keyword)):
            value = names.get(value or "", value)
        elif field == "names" and isinstance(node, (_ast.Global, _ast.Nonlocal)):
            value = [names.get(name, name) for name in node.names]
        found += f" {field}=({text(value, names)})"
    return found


def _unordered_parts(node: Any) -> list:
    """The operator and the parts of an expression whose order does not matter; else nothing.

    That of texts and lists does, but two right programs that differ in it alone are rare.
    """
    if isinstance(node, _ast.BinOp) and isinstance(node.op, COMMUTE):
        return [node.op, *parts_of(node, type(node.op))]
    if isinstance(node, _ast.BoolOp) and is_pure(node.values):
        return [node.op, *node.values]
    is_comparison = isinstance(node, _ast.Compare) and len(node.ops) == 1
    if is_comparison and isinstance(node.ops[0], (_ast.Eq, _ast.NotEq)):
        return [node.ops[0], node.left, node.comparators[0]]
    return []


def numbered(tree: Any) -> Names:
    """Every name that the program binds -> a number, or for an import what it was imported from."""
    names: Names = {}
    for node in walk(tree):
        if isinstance(node, _ast.alias):
            names.setdefault(node.asname or node.name, node.name)
            continue
        own = []
        if isinstance(node, (_ast.Name, _ast.arg, *DEFINITIONS, _ast.ExceptHandler)):
            own = bindings(node) if isinstance(node, (_ast.Name, _ast.arg)) else [node.name or ""]
        for name in own:
            names.setdefault(name, f"v{len(names)}")
    return names


def digest(said: str) -> str:
    return blake2b(said.encode("utf-8", "surrogatepass"), digest_size=32).hexdigest()


def lambdas_to_functions(tree: Any) -> None:
    """`f = lambda x: y` is a function that returns y."""
    for statements in blocks_of(tree):
        for place, statement in enumerate(statements):
            if _assigned(statement) and isinstance(statement.value, _ast.Lambda):
                statements[place] = _ast.FunctionDef(
                    name=_assigned(statement),
                    args=statement.value.args,
                    body=[_ast.Return(value=statement.value.body)],
                    decorator_list=[],
                )


def resolve_aliases(tree: Any) -> None:
    """`g = f` of a function f, which is defined once, is the function under its second name."""
    counts = bindings(tree)
    functions = {node.name: node for node in tree.body if isinstance(node, FUNCTIONS)}
    for statement in list(tree.body):
        name = _assigned(statement)
        value = getattr(statement, "value", None)
        function = functions.get(value.id) if isinstance(value, _ast.Name) else None
        if not name or function is None or counts.count(name) > 1:
            continue
        if counts.count(function.name) == 1:
            tree.body.remove(statement)
            _replace(tree.body, function.name, _ast.Name(id=name, ctx=_ast.Load()))
            function.name = name
            return


# --- functions -----------------------------------------------------------------------------------


def plain_functions(tree: Any) -> None:
    """Without decorators that change nothing, and without parameters that nobody reads."""
    identities = {node.name for node in walk(tree.body) if _returns_its_argument(node)}
    for node in walk(tree.body):
        if not isinstance(node, FUNCTIONS):
            continue
        node.decorator_list = [
            decorator
            for decorator in node.decorator_list
            if not CACHES & _words(decorator) and not identities & _words(decorator)
        ]
        _drop_parameters(node)


def _words(node: object) -> set[str]:
    attributes = [part.attr for part in walk(node) if isinstance(part, _ast.Attribute)]
    return {*loads(node), *attributes}


def _returns_its_argument(node: Any) -> bool:
    if not isinstance(node, FUNCTIONS) or len(node.body) != 1 or node.decorator_list:
        return False
    returned = getattr(node.body[0], "value", None)
    names = plain_parameters(node.args)
    return isinstance(returned, _ast.Name) and names == [returned.id]


def _drop_parameters(function: Any) -> None:
    parameters = function.args
    read = {*loads(function.body)}
    parameters.args = [*parameters.posonlyargs, *parameters.args]
    parameters.posonlyargs = []
    for field in ("vararg", "kwarg"):
        one = getattr(parameters, field)
        if one is not None and one.arg not in read:
            setattr(parameters, field, None)
    while parameters.defaults and parameters.args and parameters.args[-1].arg not in read:
        parameters.args.pop()
        parameters.defaults.pop()
    named = list(zip(parameters.kwonlyargs, parameters.kw_defaults, strict=True))
    kept = [(one, default) for one, default in named if default is None or one.arg in read]
    parameters.kwonlyargs = [one for one, _ in kept]
    parameters.kw_defaults = [default for _, default in kept]


def inline_expressions(tree: Any) -> bool:
    """Put the expression that a function returns in the place of its calls. True: one was."""
    counts = bindings(tree)
    for function in [node for node in walk(tree.body) if isinstance(node, FUNCTIONS)]:
        name = function.name
        body: list = function.body
        is_expression = len(body) == 1 and isinstance(body[0], _ast.Return) and body[0].value
        if not is_expression or function.decorator_list or counts.count(name) != 1:
            continue
        value = body[0].value
        if name in loads(value) or len(list(walk(value))) > LARGEST_INLINED:
            continue
        if _inline_calls(tree, name, function.args, value):
            return True
    return False


def _inline_calls(tree: Any, name: str, parameters: Any, value: Any) -> bool:
    changed = False
    for part in list(walk(tree.body)):
        for field in part._fields:
            inner = getattr(part, field, None)
            items = inner if isinstance(inner, list) else [inner]
            for place, item in enumerate(items):
                if not isinstance(item, _ast.Call) or not _reads(item.func, name):
                    continue
                found = _inlined(item, parameters, value)
                if found is None:
                    continue
                changed = True
                if isinstance(inner, list):
                    inner[place] = found
                else:
                    setattr(part, field, found)
    return changed


def join_wrappers(tree: Any) -> bool:
    """A function that only calls another, which nobody else calls, is that one. True: one was."""
    counts = bindings(tree)
    functions = [node for node in walk(tree.body) if isinstance(node, FUNCTIONS)]
    by_name = {node.name: node for node in functions if not node.decorator_list}
    for outer in functions:
        before: list = outer.body[:-1]
        last = outer.body[-1] if outer.body else None
        call = getattr(last, "value", None)
        if not isinstance(last, _ast.Return) or not isinstance(call, _ast.Call):
            continue
        inner = by_name.get(call.func.id) if isinstance(call.func, _ast.Name) else None
        if inner is None or inner is outer or counts.count(inner.name) != 1 or call.keywords:
            continue
        around = [statement for statement in before if statement is not inner]
        handed_on = [part.id if isinstance(part, _ast.Name) else "" for part in call.args]
        if around or outer.decorator_list or handed_on != plain_parameters(outer.args):
            continue
        calls_of_others = loads(tree.body).count(inner.name) - loads(inner.body).count(inner.name)
        if plain_parameters(inner.args) is None or calls_of_others != 1:
            continue
        if len(inner.args.args) != len(handed_on):
            continue
        _rename(inner.body, inner.name, outer.name)
        for statements in blocks_of(tree):
            statements[:] = [statement for statement in statements if statement is not inner]
        outer.args, outer.body = inner.args, inner.body
        return True
    return False


def methods_to_functions(tree: Any) -> bool:
    """Methods that use nothing of their object are functions. True: a class was changed so."""
    for node in [node for node in tree.body if isinstance(node, _ast.ClassDef)]:
        methods = [part for part in node.body if isinstance(part, FUNCTIONS)]
        names = {method.name for method in methods}
        if node.bases or node.decorator_list or len(methods) != len(node.body) or not methods:
            continue
        if names & {*bindings([part for part in tree.body if part is not node])}:
            continue
        objects: set[str] = set()
        for method in methods:
            is_static = "staticmethod" in _words(method.decorator_list)
            if not is_static and method.args.args:
                objects.add(method.args.args[0].arg)
        if any(name.startswith("__") for name in names):
            continue
        _call_directly(tree, node.name, names, objects)
        if objects & {*loads(methods)} or node.name in loads(tree.body):
            continue
        for method in methods:
            is_static = "staticmethod" in _words(method.decorator_list)
            if not is_static and method.args.args:
                del method.args.args[0]
            method.decorator_list = []
        place = tree.body.index(node)
        tree.body[place : place + 1] = methods
        return True
    return False


def _call_directly(tree: Any, kind: str, methods: set[str], objects: set[str]) -> None:
    """`Kind().m`, `Kind.m` and `self.m` become `m`."""

    def direct(node: Any) -> Any:
        if not isinstance(node, _ast.Attribute) or node.attr not in methods:
            return node
        owner = node.value
        if isinstance(owner, _ast.Call) and not owner.args and not owner.keywords:
            owner = owner.func if _reads(owner.func, kind) else owner
        is_owner = isinstance(owner, _ast.Name) and owner.id in {kind, *objects}
        return _ast.Name(id=node.attr, ctx=_ast.Load()) if is_owner else node

    for part in list(walk(tree.body)):
        for field in part._fields:
            inner = getattr(part, field, None)
            if isinstance(inner, list):
                inner[:] = [direct(item) for item in inner]
            elif isinstance(inner, _ast.Attribute):
                setattr(part, field, direct(inner))


def drop_idle_calls(tree: Any, roots: frozenset[str]) -> None:
    """What a module does beside defining names: examples, tests and prints of its own."""
    read = {*loads(tree.body)} | roots
    kept = []
    for statement in tree.body:
        idle = isinstance(statement, (_ast.Expr, _ast.Assert))
        if isinstance(statement, _ast.If):
            idle = "__name__" in loads(statement.test)
        if isinstance(statement, _ast.Assign) and _assigned(statement):
            idle = _assigned(statement) not in read
        if not idle:
            kept.append(statement)
    tree.body[:] = kept


def drop_filled(scope: Any) -> bool:
    """Take out lists and dictionaries that are filled and never read. True: something went."""
    if isinstance(scope, _ast.Module):
        return False
    parameters = set(bindings(scope.args))
    own = {_assigned(s) for statements in blocks_of(scope) for s in statements if _assigned(s)}
    for name in own - parameters:
        fills = [s for statements in blocks_of(scope) for s in statements if _fills(s, name)]
        if not fills:
            continue
        reads_there = sum(loads(statement).count(name) for statement in fills)
        new = [s for b in blocks_of(scope) for s in b if _assigned(s) == name]
        if loads(scope.body).count(name) != reads_there or not all(map(_makes_new, new)):
            continue
        for statements in blocks_of(scope):
            statements[:] = [s for s in statements if s not in fills and s not in new]
        return True
    return False


def _makes_new(statement: Any) -> bool:
    """It assigns a list, dictionary or set that nobody else has."""
    value = statement.value
    makers = ("list", "dict", "set", "defaultdict", "Counter", "deque")
    made = isinstance(value, _ast.Call) and isinstance(value.func, _ast.Name)
    return isinstance(value, DISPLAYS) or (made and value.func.id in makers)


def _fills(statement: Any, name: str) -> bool:
    """`name[...] = ...`, or a call of one of its methods whose value nobody reads."""
    if isinstance(statement, _ast.Expr) and isinstance(statement.value, _ast.Call):
        function = statement.value.func
        return isinstance(function, _ast.Attribute) and _reads(function.value, name)
    targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
    is_store = isinstance(statement, (_ast.Assign, _ast.AugAssign)) and len(targets) == 1
    if not is_store or not isinstance(targets[0], _ast.Subscript):
        return False
    return _reads(targets[0].value, name)


# --- all of it -----------------------------------------------------------------------------------


def canonical(program: str, used: tuple[str, ...] = ()) -> str:
    """A digest of what a program does, as 64 hexadecimal digits.

    `used`: source text that reads names of the program. What none of it needs is dead code; where
    it reads none of them, every name of the module counts as read.
    """
    tree: Any = compile(program, "<program>", "exec", _ast.PyCF_ONLY_AST)
    given = set(bindings(tree.body))
    wanted: set[str] = set()
    for source in used:
        wanted |= set(loads(compile(source, "<used>", "exec", _ast.PyCF_ONLY_AST)))
    roots = frozenset(wanted & given or given)
    for _ in range(MAX_ROUNDS):
        before = text(tree, {})
        lambdas_to_functions(tree)
        resolve_aliases(tree)
        tree.body = simplify(tree.body)
        drop_idle_calls(tree, roots)
        plain_functions(tree)
        methods_to_functions(tree)
        while inline_expressions(tree):
            pass
        while join_wrappers(tree):
            pass
        for scope in scopes(tree):
            while copy_values(scope, roots):
                pass
            drop_overwritten(scope)
            while drop_unused(scope, roots) or drop_filled(scope):
                pass
        if text(tree, {}) == before:
            break
    colours = colours_of(tree)
    inner = [statements for scope in scopes(tree) for statements in blocks_of(scope)]
    # the innermost blocks first
    for statements in reversed(inner):
        statements[:] = sort_independent(statements, colours)
    return digest(text(tree, numbered(tree)))
