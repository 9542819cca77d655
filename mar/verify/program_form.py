"""What two programs have in common that are one solution, written twice.

The text of this file runs in the sandbox, in front of `sandbox_child.py`, before the program does;
so it is standard library only and imports little. Both directions of an error are cheap here but
one: a rewrite that passes for another solution is paid again. So where it is unclear whether two
programs differ, they do not.

    dead code         what is never reached, never used, or changes nothing is gone
    copies            y = x, and a value that is used once, in the next statement, stand in place
    order             independent statements are sorted
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
# what runs its names later, more than once, or never
DEFERRED = (_ast.Lambda, _ast.ListComp, _ast.SetComp, _ast.DictComp, _ast.GeneratorExp)
EFFECTS = (*JUMPS, _ast.Yield, _ast.YieldFrom, _ast.Await, _ast.Delete, _ast.NamedExpr)
NOT_PURE = (*EFFECTS, _ast.Call)

# their calls change nothing that a test can see
HARMLESS = frozenset(
    "abs all any bool bytes chr dict divmod enumerate filter float frozenset hash id int isinstance "
    "len list map max min ord pow print range repr reversed round set sorted str sum tuple type zip".split()
)

MIRRORED = {_ast.Gt: _ast.Lt, _ast.GtE: _ast.LtE}
NEGATED = {
    _ast.Eq: _ast.NotEq,
    _ast.NotEq: _ast.Eq,
    _ast.Is: _ast.IsNot,
    _ast.IsNot: _ast.Is,
    _ast.In: _ast.NotIn,
    _ast.NotIn: _ast.In,
}

# simplifying ends earlier; a program that would go on is compared as it then is
MAX_ROUNDS = 12


def walk(node: object) -> Iterator[Any]:
    """Every node of a syntax tree, or of a list of them, parents first."""
    if isinstance(node, list):
        for part in node:
            yield from walk(part)
    elif isinstance(node, _ast.AST):
        yield node
        for field in node._fields:
            yield from walk(getattr(node, field, None))


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
        mirrored = MIRRORED.get(type(node.ops[0]))
        if mirrored:
            # a > b is b < a
            node.left, node.comparators = node.comparators[0], [node.left]
            node.ops = [mirrored()]
        return node
    if isinstance(node, _ast.BinOp):
        return _simple_binary(node)
    if isinstance(node, _ast.IfExp) and isinstance(node.test, _ast.Constant):
        return node.body if node.test.value else node.orelse
    bare_call = isinstance(node, _ast.Call) and not node.args and not node.keywords
    if bare_call and isinstance(node.func, _ast.Lambda) and not bindings(node.func.args):
        # (lambda: x)() is x
        return node.func.body
    return node


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
        if isinstance(inner, _ast.Compare) and len(inner.ops) == 1:
            negated = NEGATED.get(type(inner.ops[0]))
            if negated:
                inner.ops = [negated()]
                return inner
    return node


def _simple_binary(node: Any) -> Any:
    left, right = node.left, node.right
    numbers = [
        side.value
        for side in (left, right)
        if isinstance(side, _ast.Constant) and type(side.value) is int
    ]
    if len(numbers) == 2 and max(map(abs, numbers)) < 1 << 32:
        a, b = numbers
        if isinstance(node.op, _ast.Add):
            return _ast.Constant(value=a + b)
        if isinstance(node.op, _ast.Sub):
            return _ast.Constant(value=a - b)
        if isinstance(node.op, _ast.Mult):
            return _ast.Constant(value=a * b)
    commutes = isinstance(node.op, (_ast.Add, _ast.Mult))
    if commutes and isinstance(left, _ast.Constant) and not isinstance(right, _ast.Constant):
        # 2 * x is x * 2
        node.left, node.right = left, right = right, left
    if isinstance(right, _ast.Constant) and type(right.value) is int:
        adds_nothing = right.value == 0 and isinstance(node.op, (_ast.Add, _ast.Sub))
        keeps = right.value == 1 and isinstance(node.op, (_ast.Mult, _ast.Pow))
        if adds_nothing or keeps:
            return left
    return node


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
    if isinstance(node, _ast.Expr):
        return [] if is_pure(node.value) else [node]
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
    if isinstance(node, _ast.While) and isinstance(node.test, _ast.Constant) and _ends(node.body):
        # `while True: return x` is left in its first round
        leaves = any(isinstance(part, (_ast.Break, _ast.Continue)) for part in walk(node.body))
        return [node] if leaves else node.body
    if isinstance(node, (_ast.For, _ast.While)) and not node.body and not node.orelse:
        head = node.iter if isinstance(node, _ast.For) else node.test
        return [] if isinstance(node, _ast.For) and is_pure(head) else [node]
    if isinstance(node, _ast.For) and _runs_once(node):
        return [*node.body, *node.orelse]
    if isinstance(node, _ast.Try):
        return _simple_try(node)
    return [node]


def _simple_assignment(node: Any) -> list:
    if len(node.targets) > 1 and is_pure(node.value):
        return [_ast.Assign(targets=[target], value=node.value) for target in node.targets]
    target = node.targets[0]
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


def _simple_try(node: Any) -> list:
    raises_again = all(
        len(handler.body) == 1
        and isinstance(handler.body[0], _ast.Raise)
        and handler.body[0].exc is None
        for handler in node.handlers
    )
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
    """The names that a statement binds, where it does nothing else."""
    if isinstance(statement, DEFINITIONS):
        return [] if statement.decorator_list else [statement.name]
    if isinstance(statement, IMPORTS):
        return bindings(statement)
    if isinstance(statement, _ast.Assign) and is_pure(statement.value):
        names = all(isinstance(target, (_ast.Name, _ast.Tuple)) for target in statement.targets)
        stores = [p for target in statement.targets for p in walk(target)]
        plain = not any(isinstance(part, (_ast.Attribute, _ast.Subscript)) for part in stores)
        return bindings(statement.targets) if names and plain else []
    return []


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
            following = statements[place + 1 : place + 2]
            heads = [_head(part) for part in following]
            if number_of_loads == 1 and name in loads(heads) and not _is_deferred(heads, name):
                _replace(following, name, value)
                del statements[place]
                return True
    return False


def _head(statement: Any) -> list:
    """What a statement evaluates at once, without the blocks in it."""
    if isinstance(statement, (*DEFINITIONS, _ast.While)):
        return []
    return [
        getattr(statement, field, None)
        for field in statement._fields
        if field not in ("body", "orelse", "finalbody", "handlers")
    ]


def _is_deferred(nodes: list, name: str) -> bool:
    return any(name in loads(part) for part in walk(nodes) if isinstance(part, DEFERRED))


def _replace(node: object, name: str, value: Any) -> None:
    """Put a value in the place of every reading of a name."""
    for part in walk(node):
        for field in part._fields:
            inner = getattr(part, field, None)
            if isinstance(inner, list):
                inner[:] = [value if _reads(item, name) else item for item in inner]
            elif _reads(inner, name):
                setattr(part, field, value)


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
            said = text(head, colours)
            own = bindings(head) + loads(head)
            for position, name in enumerate(own):
                if name in places:
                    places[name].append(f"{type(unit).__name__} {position} {said}")
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
    lambdas_to_functions(tree)
    resolve_aliases(tree)
    for _ in range(MAX_ROUNDS):
        before = text(tree, {})
        tree.body = simplify(tree.body)
        for scope in scopes(tree):
            while copy_values(scope, roots):
                pass
            drop_overwritten(scope)
            while drop_unused(scope, roots):
                pass
        if text(tree, {}) == before:
            break
    colours = colours_of(tree)
    inner = [statements for scope in scopes(tree) for statements in blocks_of(scope)]
    # the innermost blocks first
    for statements in reversed(inner):
        statements[:] = sort_independent(statements, colours)
    return digest(text(tree, numbered(tree)))
