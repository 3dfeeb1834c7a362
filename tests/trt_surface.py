"""Whether what we use of TensorRT exists in datacenter TensorRT 11.4, which cannot run where these tests do.

Two ways, each blind where the other sees. `static_faults` reads sources: names behind the module object, on every path,
but not the methods of a network, whose receiver it cannot type, nor a name that another file gives to one of them.
`record` wraps the module: every attribute and call on it and on what comes from it, but only on the paths that a test
runs. Both compare with the names in fixtures/, written by scripts/tensorrt_api.py. Neither knows what 11.4 does with a
call that it declares. Knows nothing of pytest.
"""

import ast
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from inspect import isroutine
from pathlib import Path
from typing import Any

SURFACE = Path(__file__).parent / "fixtures" / "tensorrt-11.4-api.json"

# The module object of TensorRT goes by these names, as a variable or as an attribute.
MODULE_NAMES = ("trt", "_trt")
PACKAGES = ("tensorrt", "tensorrt_rtx")

# Enums whose members may be named by a computed string: tests/test_trt_lowering.py records which ones are.
RECORDED_ENUMS = [
    [name]
    for name in ("ElementWiseOperation", "UnaryOperation", "ActivationType", "ReduceOperation", "ComputeCapability")
]

# Values that are handed out as they are: Python reads them through protocols that a wrapper cannot offer.
UNWRAPPED = ("Dims", "IHostMemory", "Permutation")


@dataclass(frozen=True)
class Use:
    """One use of `owner.name`; the owner is a class, or empty for the module. A constructor is a call of __init__."""

    owner: str
    name: str
    how: str = "read"
    positional: int = 0
    keywords: tuple[str, ...] = ()


class Surface:
    """What the API declares, by class, with inheritance."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        self.version: str = table["version"]
        self.classes: dict[str, dict[str, Any]] = table["classes"]
        self.functions: dict[str, list[str]] = table["functions"]
        self.module = {*self.classes, *self.functions, *table["constants"]}

    @classmethod
    def load(cls, file: Path = SURFACE) -> "Surface":
        return cls(json.loads(file.read_text(encoding="utf-8")))

    def lineage(self, owner: str) -> Iterator[str]:
        if owner in self.classes:
            yield owner
            for base in self.classes[owner].get("bases", ()):
                yield from self.lineage(base)

    def fault(self, use: Use) -> str | None:
        """What is wrong with the use in this API, or nothing."""
        full = f"{use.owner}.{use.name}".lstrip(".")
        if not use.owner:
            known, signatures = use.name in self.module, self.functions.get(use.name, [])
        elif use.owner not in self.classes:
            return f"{self.version} has no {use.owner}"
        else:
            rows = [self.classes[name] for name in self.lineage(use.owner)]
            groups = [row[group] for row in rows for group in row if group != "bases" and use.name in row[group]]
            known, signatures = bool(groups), next((each[use.name] for each in groups if isinstance(each, dict)), [])
            if known and use.how == "set" and not any(use.name in row.get("write", ()) for row in rows):
                return f"{self.version} cannot set {full}"
        if not known:
            return f"{self.version} has no {full}"
        if use.how == "call" and not any(_takes(each, use) for each in signatures):
            given = ", ".join([f"{use.positional} by position", *(f"{name}=" for name in use.keywords)])
            return f"{self.version} has {full}({' | '.join(signatures)}), which does not take {given}"
        return None

    def chain_fault(self, names: list[str], call: Use | None) -> str | None:
        """The same for `trt.A.B.C`, as far as its types are known; `call` has the arguments if it is called."""
        owner = ""
        for name in names:
            if name.startswith("__") and name != "__init__":
                return None
            if fault := self.fault(Use(owner, name)):
                return fault
            scopes = [*self.lineage(owner)] if owner else [""]
            inner = next((path for each in scopes if (path := f"{each}.{name}".lstrip(".")) in self.classes), None)
            if inner is None and name not in self.classes.get(owner, {}).get("members", ()):
                break
            owner = inner or owner
        else:
            is_class = call is not None and "members" not in self.classes[owner]
            return self.fault(replace(call, owner=owner, name="__init__")) if call and is_class else None
        if call is None or name is not names[-1] or (owner and name != "__init__"):
            return None
        # Class.__init__(self, ...) in a subclass
        return self.fault(replace(call, owner=owner, name=name, positional=call.positional - bool(owner)))

    def permits(self, use: Use, allowed: Mapping[str, str]) -> bool:
        """Whether the list has the class or the attribute, under the name of the class or of one it inherits from."""
        owners = {use.owner, *self.lineage(use.owner)}
        return not allowed.keys().isdisjoint({*owners, *(f"{owner}.{use.name}".lstrip(".") for owner in owners)})


def _takes(signature: str, use: Use) -> bool:
    parameters = signature.split()
    rest = parameters[use.positional :]
    # pybind11 calls a parameter without a name arg0; it cannot be passed by keyword
    names = {each.rstrip("=") for each in rest if each.rstrip("0123456789=") != "arg"}
    required = {each for each in rest if not each.endswith("=")}
    return use.positional <= len(parameters) and required <= set(use.keywords) <= names


def recorded_faults(uses: Iterable[Use], surface: Surface, allowed: Mapping[str, str]) -> list[str]:
    """Every recorded use that the API lacks and the list does not have."""
    return sorted({fault for use in uses if (fault := surface.fault(use)) and not surface.permits(use, allowed)})


def static_faults(
    files: Iterable[Path], surface: Surface, allowed: Mapping[str, str], modules: tuple[str, ...] = MODULE_NAMES
) -> list[str]:
    """Every fault in the sources as `file.py:line: what`, and every entry of the list that should not be there."""
    found: list[str] = []
    used: set[str] = set()
    any_use = False
    for file in files:
        source = _Source(ast.parse(file.read_text(encoding="utf-8")), file, modules)
        complaints = list(source.complaints())
        for line, names, call in source.chains():
            any_use = True
            fault = surface.chain_fault(names, call)
            if fault and not any(".".join(names[:end]) in allowed for end in (1, 2)):
                complaints.append((line, fault))
        for entry in allowed:
            last = entry.rpartition(".")[2]
            for node in source.mentions(last):
                used.add(entry)
                if not _guarded(source, node, last):
                    complaints.append((node.lineno, f"{entry} is only in TensorRT-RTX and is used without a guard"))
        found += [f"{file.name}:{line}: {what}" for line, what in sorted(set(complaints))]
    if not any_use:
        found.append(f"no file uses TensorRT through a name of {', '.join(modules)}, so nothing was checked")
    for entry in allowed:
        owner, _, name = entry.rpartition(".")
        if surface.fault(Use(owner, name)) is None:
            found.append(f"ALLOWED_RTX_ONLY: {surface.version} has {entry} too")
        elif entry not in used:
            found.append(f"ALLOWED_RTX_ONLY: {entry} is not used")
    return found


class _Source:
    """One file as a tree that can be walked upwards."""

    def __init__(self, tree: ast.Module, file: Path, modules: tuple[str, ...]) -> None:
        self.file = file
        self.nodes = list(ast.walk(tree))
        self.parent = {child: node for node in self.nodes for child in ast.iter_child_nodes(node)}
        imported = [alias for node in self.nodes if isinstance(node, ast.Import) for alias in node.names]
        self.modules = {*modules, *(alias.asname or alias.name for alias in imported if alias.name in PACKAGES)}
        named = [node.id for node in self.nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
        named += [node.arg for node in self.nodes if isinstance(node, ast.arg)]
        self.aliases: dict[str, list[str]] = {}
        for node in self.nodes:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=value) if named.count(name) == 1:
                    if (chain := self._chain(value)) is not None:
                        self.aliases[name] = chain

    def chains(self) -> Iterator[tuple[int, list[str], Use | None]]:
        """Every `trt.A.B` at full length, without the module, with its arguments if it is called and they are known."""
        for node in self.nodes:
            parent = self.parent.get(node)
            called = isinstance(parent, ast.Call) and parent.func is node
            if not isinstance(node, ast.Attribute | ast.Call | ast.Name) or isinstance(parent, ast.Attribute):
                continue
            if (called or not isinstance(node, ast.Name)) and (names := self._chain(node)):
                yield node.lineno, names, _call(parent) if called else None

    def _chain(self, node: ast.AST) -> list[str] | None:
        """The names behind the module, also through a name that the file gives to one of them once, or None."""
        names = self._names(node)
        for at, name in enumerate(names):
            if name in self.modules:
                return names[at + 1 :]
        return self.aliases[names[0]] + names[1:] if names and names[0] in self.aliases else None

    def _names(self, node: ast.AST) -> list[str]:
        match node:
            case ast.Name(id=name):
                return [name]
            case ast.Attribute(value=value, attr=name):
                return [*self._names(value), name]
            case ast.Call(func=ast.Name(id="getattr"), args=[value, ast.Constant(value=str(name)), *_]):
                return [*self._names(value), name]
        return []

    def complaints(self) -> Iterator[tuple[int, str]]:
        """What hides a name from this check."""
        for node in self.nodes:
            match node:
                case ast.ImportFrom(module=str(module), level=0) if module.partition(".")[0] in PACKAGES:
                    yield node.lineno, "names imported from TensorRT are not checked: import the module"
                case ast.Call(func=ast.Name(id="getattr"), args=[value, ast.expr() as name, *_]):
                    chain = self._chain(value)
                    if not isinstance(name, ast.Constant) and chain is not None and chain not in RECORDED_ENUMS:
                        yield node.lineno, "a name of TensorRT that is computed is not checked: spell it out"

    def mentions(self, name: str) -> Iterator[ast.expr]:
        for node in self.nodes:
            match node:
                case ast.Attribute(attr=attribute) if attribute == name:
                    yield node
                case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=value), *_]) if value == name:
                    yield node


def _call(node: Any) -> Use | None:
    starred = any(isinstance(each, ast.Starred) for each in node.args) or any(k.arg is None for k in node.keywords)
    return None if starred else Use("", "", "call", len(node.args), tuple(k.arg for k in node.keywords))


def _guarded(source: _Source, node: ast.AST, name: str) -> bool:
    """Whether the code around the node says that it is for TensorRT-RTX.

    Says so: an enclosing function, class or file with rtx in its name; a branch, an earlier operand of `and` or an
    earlier early exit whose condition speaks of rtx or asks hasattr for the name; a case whose pattern speaks of rtx.
    """
    while (parent := source.parent.get(node)) is not None:
        for where, branch in ast.iter_fields(parent):
            place = branch if isinstance(branch, list) else [branch]
            if node not in place:
                continue
            before = place[: place.index(node)]
            match parent:
                case ast.If(test=test) | ast.IfExp(test=test):
                    if _says_rtx(test, name) is {"body": True, "orelse": False}.get(where, ...):
                        return True
                case ast.match_case(pattern=pattern) if where == "body" and "rtx" in ast.unparse(pattern).lower():
                    return True
                case ast.BoolOp(op=ast.And()) if any(_says_rtx(each, name) for each in before):
                    return True
                case ast.FunctionDef(name=scope) | ast.ClassDef(name=scope) if "rtx" in scope.lower():
                    return True
            for each in before:
                leaves = isinstance(each, ast.If) and isinstance(each.body[-1], ast.Return | ast.Raise | ast.Continue)
                if leaves and _says_rtx(each.test, name) is False:
                    return True
        node = parent
    return "rtx" in source.file.name.lower()


def _says_rtx(test: ast.expr, name: str) -> bool | None:
    """The value of the condition that only TensorRT-RTX gives it, or None if it does not tell."""
    match test:
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            inner = _says_rtx(operand, name)
            return None if inner is None else not inner
        case ast.BoolOp(op=op, values=values):
            said = [_says_rtx(each, name) for each in values]
            decisive = isinstance(op, ast.And)
            return decisive if decisive in said else (not decisive if set(said) == {not decisive} else None)
        case ast.Compare(ops=[ast.NotEq() | ast.IsNot() | ast.NotIn()]):
            return False if "rtx" in ast.unparse(test).lower() else None
    text = ast.unparse(test)
    return True if "rtx" in text.lower() or ("hasattr(" in text and repr(name) in text) else None


def record(module: Any) -> tuple[Any, dict[Use, None]]:
    """The module in a wrapper, and the uses that the wrapper sees, which grow while it is used.

    What the wrapper hands out is wrapped too, except enum members and UNWRAPPED, and is unwrapped when it is passed
    back. Its classes can be inherited from; what a subclass then does to itself is not seen, nor are special methods.
    """
    tape = _Tape(module)
    return tape.wrap(module), tape.uses


class _Tape:
    def __init__(self, module: Any) -> None:
        self.uses: dict[Use, None] = {}
        self.module = module
        self.plain = tuple(getattr(module, name) for name in UNWRAPPED)
        # the wrapped objects too: an id is an identity only while its object lives
        self.wrappers: dict[int, tuple[Any, _Wrapper]] = {}
        self.package = module.Builder.__module__

    def wrap(self, value: Any) -> Any:
        if isinstance(value, list | tuple) and type(value) in (list, tuple):
            return type(value)(map(self.wrap, value))
        is_class = isinstance(value, type)
        home = value if is_class else type(value)
        if value is not self.module and home.__module__ != self.package:
            return value
        if not is_class and (hasattr(home, "__members__") or isinstance(value, self.plain)):
            return value
        if id(value) not in self.wrappers:
            self.wrappers[id(value)] = value, (_Class if is_class else _Wrapper)(self, value)
        return self.wrappers[id(value)][1]

    def unwrap(self, value: Any) -> Any:
        if isinstance(value, _Wrapper):
            return _raw(value)
        if type(value) in (list, tuple):
            return type(value)(map(self.unwrap, value))
        if type(value) is dict:
            return {key: self.unwrap(each) for key, each in value.items()}
        return value

    def owner(self, raw: Any) -> str:
        if raw is self.module:
            return ""
        owner: str = (raw if isinstance(raw, type) else type(raw)).__qualname__
        return owner

    def calls(self, function: Any, owner: str, name: str, bound: int = 0) -> Any:
        """The function, which takes `bound` arguments in front of those that count, so that its calls are seen."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.uses[Use(owner, name, "call", len(args) - bound, tuple(kwargs))] = None
            return self.wrap(function(*self.unwrap(args), **self.unwrap(kwargs)))

        return call


def _raw(wrapper: "_Wrapper") -> Any:
    return object.__getattribute__(wrapper, "_raw")


class _Wrapper:
    """Stands for the module or an object of one of its classes."""

    def __init__(self, tape: _Tape, raw: Any) -> None:
        object.__setattr__(self, "_tape", tape)
        object.__setattr__(self, "_raw", raw)

    def __getattr__(self, name: str) -> Any:
        value, owner = getattr(self._raw, name), self._tape.owner(self._raw)
        if isroutine(value) and not name.startswith("__") and not isinstance(self._raw, type):
            return self._tape.calls(value, owner, name)
        if not name.startswith("__"):
            self._tape.uses[Use(owner, name)] = None
        return self._tape.wrap(value)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("__"):  # layer.__class__ = trt.IShuffleLayer
            self._tape.uses[Use(self._tape.owner(self._raw), name, "set")] = None
        setattr(self._raw, name, self._tape.unwrap(value))

    def __eq__(self, other: object) -> bool:
        return bool(self._raw == self._tape.unwrap(other))

    def __hash__(self) -> int:
        return hash(self._raw)

    def __bool__(self) -> bool:
        return bool(self._raw)

    def __repr__(self) -> str:
        return repr(self._raw)

    def __len__(self) -> int:
        return len(self._raw)

    def __getitem__(self, key: Any) -> Any:
        return self._tape.wrap(self._raw[key])


class _Class(_Wrapper):
    """Stands for a class: it can be called, inherited from, and asked for its members."""

    def __getattribute__(self, name: str) -> Any:
        if name == "__init__":  # Class.__init__(self, ...) in a subclass
            tape, raw = object.__getattribute__(self, "_tape"), _raw(self)
            return tape.calls(raw.__init__, tape.owner(raw), name, bound=1)
        return super().__getattribute__(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if hasattr(self._raw, "__members__"):
            return self._raw(*args, **kwargs)
        return self._tape.calls(self._raw, self._tape.owner(self._raw), "__init__")(*args, **kwargs)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (self._raw,)
