"""A chat template, and whether it can be rendered piece by piece as a conversation grows.

Most templates show each message by itself, or with a look at its neighbours. `ChatTemplate` proves that on
the template's syntax tree; then `pieces` renders a few messages as they stand inside a long conversation, and
the time does not depend on what came before. Whatever is not proven is rendered whole by whoever asks.

Proven means: one loop over the messages, at the top level. What stands before it may look at the first
messages (and leave them out of the loop), and is the same for all that follows. The loop's body looks at its
message, at `messages[loop.index0 - 1]` and `[loop.index0 + 1]`, and whether it is the first or the last.
Nothing is carried from one message to the next (Jinja's scopes see to that, but for namespaces). After the
loop comes what begins the answer. No clock, no chance.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2 import nodes

CONTEXT_MESSAGES = 2
"""So many messages must stand before a window: the first ones are special."""

FIRST_MESSAGES = 4
"""Of the conversation, that `pieces` wants for what stands before the loop."""
MOST_LEFT_OUT = 2
"""First messages that a template may leave out of its loop, one by one."""

_WINDOW = "antiphon_window"
_MARK = "antiphon_mark"
_BANNED_NAMES = frozenset(
    {"namespace", "cycler", "joiner", "strftime_now", "lipsum", "self", "caller", "varargs", "kwargs"}
)
_STATEMENTS = (
    nodes.Output, nodes.If, nodes.For, nodes.Assign, nodes.AssignBlock, nodes.Continue, nodes.ExprStmt,
)  # fmt: skip
_EXPRESSIONS = (
    nodes.Name, nodes.Const, nodes.TemplateData, nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.Filter,
    nodes.Test, nodes.Call, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Add,
    nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Pow, nodes.Neg, nodes.Pos, nodes.Concat,
    nodes.CondExpr, nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair, nodes.Keyword,
)  # fmt: skip


class NotProven(Exception):
    """The template may look further than its messages' neighbours; the text says where."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """Text of single messages as they stand in a conversation, and what begins the answer after the last."""

    messages: tuple[str, ...]
    answer: str


class ChatTemplate:
    """One compiled template."""

    def __init__(self, environment: jinja2.Environment, source: str) -> None:
        """Raises `jinja2.TemplateError` if it does not compile."""
        self._whole = environment.from_string(source)
        self._stepwise: jinja2.Template | None = None
        self.why_whole = ""
        """Why it cannot be rendered piece by piece; "" if it can."""
        try:
            self._stepwise = environment.from_string(_stepwise(environment.parse(source)))
        except NotProven as reason:
            self.why_whole = str(reason)
        except jinja2.TemplateError as error:
            self.why_whole = f"the changed template does not compile: {error}"

    def render(self, variables: Mapping[str, Any]) -> str:
        """The whole conversation, `variables["messages"]`."""
        return self._whole.render(variables)

    def pieces(self, variables: Mapping[str, Any], window: Sequence[Mapping[str, Any]]) -> Pieces | None:
        """Texts of the window's messages, a stretch of a conversation up to its end; None = render it whole.

        `variables["messages"]` needs only the conversation's first FIRST_MESSAGES messages. The text of the
        window's first message is not to be trusted, as what stands before it is not known; that of the
        others is, if at least CONTEXT_MESSAGES messages stand before the window.
        """
        if self._stepwise is None:
            return None
        mark = f"\0{secrets.token_hex(16)}\0"
        text = self._stepwise.render({**variables, _WINDOW: list(window), _MARK: mark})
        _, *texts = text.split(mark)
        if len(texts) != len(window) + 1:
            return None
        return Pieces(tuple(texts[:-1]), texts[-1])


# ---------------------------------------------------------------- the proof


def _stepwise(tree: nodes.Template) -> nodes.Template:
    """The template with the window for its messages, a mark before each and at the end, and nothing said
    before them. Raises `NotProven`."""
    at = _find_loop(tree.body)
    loop = tree.body[at]
    assert isinstance(loop, nodes.For)
    for node in tree.body[:at]:
        if not isinstance(node, nodes.Macro):
            _silence(node)
    for name in list(_loop_names(loop)):
        name.name = _WINDOW
    loop.body.insert(0, _say_mark())
    tree.body.insert(at + 1, _say_mark())
    if tree.environment is not None:
        tree.set_environment(tree.environment)  # of the new nodes
    return tree


def _find_loop(body: Sequence[nodes.Node]) -> int:
    """Where the loop over the messages stands. Checks all of the template."""
    aliases, left_out = frozenset({"messages"}), 0
    for at, node in enumerate(body):
        if isinstance(node, nodes.For) and _is_alias(node.iter, aliases):
            _check_loop(node, aliases)
            for later in body[at + 1 :]:
                _check_plain(later, aliases, "after the loop over the messages")
            return at
        if isinstance(node, nodes.Macro):
            _check_plain_macro(node, aliases)
            continue
        aliases = _check_head(node, aliases)
        left_out += sum(_leaves_one_out(inner, aliases) for inner in _walk(node))
        if left_out > MOST_LEFT_OUT:
            raise NotProven("too many messages may be left out of the loop")
    raise NotProven("there is no loop over the messages at the top level")


def _check_head(node: nodes.Node, aliases: frozenset[str]) -> frozenset[str]:
    """What stands before the loop may look at the first message, and give the messages other names."""
    for inner in _walk(node):
        if isinstance(inner, nodes.Assign) and isinstance(inner.target, nodes.Name):
            if _is_list_of_messages(inner.node, aliases):
                aliases |= {inner.target.name}
            elif inner.target.name in aliases:
                raise NotProven(f"`{inner.target.name}` is the messages, and then something else")
    harmless = {id(name) for inner in _walk(node) for name in _harmless_in_head(inner, aliases)}
    _check_names(node, aliases, harmless, "before the loop over the messages")
    return aliases


def _harmless_in_head(node: nodes.Node, aliases: frozenset[str]) -> Iterator[nodes.Node]:
    """Uses of the messages that say the same however many there are."""
    if isinstance(node, nodes.Getitem) and _is_alias(node.node, aliases):
        index = node.arg
        if isinstance(index, nodes.Const) and index.value == 0 and not isinstance(index.value, bool):
            yield node.node
    elif isinstance(node, nodes.Assign) and _is_list_of_messages(node.node, aliases):
        yield node.target
        yield node.node if isinstance(node.node, nodes.Name) else node.node.node  # type: ignore[attr-defined]
    elif isinstance(node, nodes.If | nodes.CondExpr):
        yield from _operands(node.test)
    elif isinstance(node, nodes.And | nodes.Or):
        yield from _operands(node)


def _operands(node: nodes.Node) -> Iterator[nodes.Node]:
    """What only counts as true or false: a list of messages is never empty."""
    if isinstance(node, nodes.And):
        yield from _operands(node.left)
        yield from _operands(node.right)
    elif isinstance(node, nodes.Name):
        yield node


def _is_list_of_messages(node: nodes.Node, aliases: frozenset[str]) -> bool:
    """`messages`, or `messages[1:]`."""
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        part = node.arg
        one = isinstance(part.start, nodes.Const) and part.start.value == 1
        return one and part.stop is None and part.step is None and _is_alias(node.node, aliases)
    return _is_alias(node, aliases)


def _leaves_one_out(node: nodes.Node, aliases: frozenset[str]) -> bool:
    return (
        isinstance(node, nodes.Assign)
        and not isinstance(node.node, nodes.Name)
        and (_is_list_of_messages(node.node, aliases))
    )


def _check_loop(loop: nodes.For, aliases: frozenset[str]) -> None:
    if loop.else_ or loop.recursive or loop.test is not None:
        raise NotProven("the loop over the messages has a condition, an else or recursion")
    if not isinstance(loop.target, nodes.Name):
        raise NotProven("the loop over the messages has several variables")
    harmless = {id(name) for name in _loop_names(loop)}
    for node in loop.body:
        _check_names(node, aliases, harmless, "in the loop over the messages")
        for inner in _walk(node):
            if isinstance(inner, nodes.Assign | nodes.AssignBlock):
                targets = [inner.target, *inner.target.find_all(nodes.Name)]
                if any(isinstance(t, nodes.Name) and t.name in aliases | {"loop"} for t in targets):
                    raise NotProven("the loop over the messages gives their name to something else")
        _check_loop_variable(node)


def _check_loop_variable(node: nodes.Node) -> None:
    """Of the outer `loop`: first and last, and index0 where a neighbour is looked at."""
    looked_at = {id(found.node) for found in _own(node) if isinstance(found, nodes.Getattr)}
    harmless = {id(_neighbour_index(found)) for found in _own(node) if isinstance(found, nodes.Getitem)}
    harmless |= {
        id(found.expr)
        for found in _own(node)
        if isinstance(found, nodes.Compare) and _asks_for_the_first(found)
    }
    for found in _own(node):
        if isinstance(found, nodes.Name) and found.name == "loop" and id(found) not in looked_at:
            raise NotProven("the loop over the messages passes `loop` on")
        if not isinstance(found, nodes.Getattr) or not _is_loop(found.node) or id(found) in harmless:
            continue
        if found.attr not in ("first", "last"):
            raise NotProven(f"the loop over the messages looks at loop.{found.attr}")


def _loop_names(loop: nodes.For) -> Iterator[nodes.Name]:
    """The messages' names where the loop may use them: what it goes over, and its message's neighbours."""
    assert isinstance(loop.iter, nodes.Name)
    yield loop.iter
    for node in loop.body:
        for found in _own(node):
            if isinstance(found, nodes.Getitem) and _neighbour_index(found) is not None:
                base = found.node
                # Another name may stand for a list that begins elsewhere: an index means another message.
                if isinstance(base, nodes.Name) and base.name == loop.iter.name:
                    yield base


def _neighbour_index(node: nodes.Getitem) -> nodes.Getattr | None:
    """The `loop.index0` of `x[loop.index0 - 1]` or `x[loop.index0 + 1]`."""
    arg = node.arg
    if isinstance(arg, nodes.Add | nodes.Sub) and isinstance(arg.right, nodes.Const) and arg.right.value == 1:
        left = arg.left
        if isinstance(left, nodes.Getattr) and _is_loop(left.node) and left.attr == "index0":
            return left
    return None


def _asks_for_the_first(node: nodes.Compare) -> bool:
    """`loop.index0 == 0` and the like: the same for all messages but the first."""
    if len(node.ops) != 1 or not isinstance(node.expr, nodes.Getattr):
        return False
    least = {"index0": 0, "index": 1}.get(node.expr.attr) if _is_loop(node.expr.node) else None
    other = node.ops[0].expr
    return isinstance(other, nodes.Const) and type(other.value) is int and other.value == least


def _check_plain(node: nodes.Node, aliases: frozenset[str], where: str) -> None:
    _check_names(node, aliases, set(), where)


def _check_plain_macro(macro: nodes.Macro, aliases: frozenset[str]) -> None:
    for node in (*macro.body, *macro.defaults):
        _check_names(node, aliases, set(), f"in the macro {macro.name}")
        if any(_is_loop(found) for found in _own(node)):
            raise NotProven(f"the macro {macro.name} looks at `loop`")


def _check_names(node: nodes.Node, aliases: frozenset[str], harmless: set[int], where: str) -> None:
    """Only statements and expressions that are known here, and no name that could tell of other messages."""
    for found in _walk(node):
        if not isinstance(found, (*_STATEMENTS, *_EXPRESSIONS)):
            raise NotProven(f"{where}: {type(found).__name__.lower()} (line {found.lineno})")
        if isinstance(found, nodes.Filter) and found.name == "random":
            raise NotProven(f"{where}: chance")
        if isinstance(found, nodes.Name):
            if found.name in _BANNED_NAMES:
                raise NotProven(f"{where}: `{found.name}`")
            if found.name in aliases and id(found) not in harmless:
                raise NotProven(f"{where}: `{found.name}` as a whole (line {found.lineno})")


def _is_alias(node: nodes.Node | None, aliases: frozenset[str]) -> bool:
    return isinstance(node, nodes.Name) and node.name in aliases


def _is_loop(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Name) and node.name == "loop"


def _walk(node: nodes.Node) -> Iterator[nodes.Node]:
    yield node
    for child in node.iter_child_nodes():
        yield from _walk(child)


def _own(node: nodes.Node) -> Iterator[nodes.Node]:
    """The node and what is in it, but not the bodies of loops in it, which have a `loop` of their own."""
    yield node
    inside = {id(child) for child in node.body} if isinstance(node, nodes.For) else set()
    for child in node.iter_child_nodes():
        if id(child) not in inside:
            yield from _own(child)


# ---------------------------------------------------------------- the change


def _silence(node: nodes.Node) -> None:
    """Take out what the node and all in it say; what it sets stays."""
    if isinstance(node, nodes.Output):
        node.nodes = [nodes.TemplateData("")]
    elif not isinstance(node, nodes.AssignBlock):  # a block's text is what it sets
        for child in node.iter_child_nodes():
            _silence(child)


def _say_mark() -> nodes.Output:
    return nodes.Output([nodes.Name(_MARK, "load")], lineno=1)
