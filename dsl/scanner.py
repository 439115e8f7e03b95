"""Finds the operator expressions, the df calls and the statements that carry SQL in literals.

PostgreSQL's grammar is too big to parse here and not needed: between boundaries (a comma, a bracket, a comparison, a
reserved word) an expression is one level of operands joined by operators of equal precedence that group to the left.
Tighter operators belong to their operand. Nothing recurses: brackets nest on a stack of `Frame`s.

Whether an operator is meant as ours, dsl.evidence says: others spell theirs the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from dsl.dialect import (
    BOUNDARIES,
    COMPARE,
    DISTINCTIVE,
    IDENT,
    INFIX,
    JOIN_WORDS,
    LOOP,
    NUMBER,
    OP,
    PARAM,
    PUNCT,
    QUOTED,
    SOFT,
    STATEMENT_OPENERS,
    STRING,
    TIGHT,
    Tokens,
    names,
)
from dsl.evidence import NEUTRAL, NOTHING, Evidence, reads_as_step
from dsl.flow import Flow
from dsl.surface import BUILDERS, FUNCTIONS, Function

#: What an operand is, as far as it matters: a plain literal, a df call, surely not text, a group, a CASE,
#: a name, anything else.
LITERAL, CALL, NONTEXT, GROUP, CASED, NAME, ANYTHING = range(7)

_TEXT_TYPES = frozenset({"text", "varchar"})
_NONTEXT_TYPES = names(
    """int integer int2 int4 int8 smallint bigint numeric decimal real float float4 float8 boolean bool bit varbit json
    jsonb bytea date time timestamp timestamptz timetz interval uuid inet cidr macaddr macaddr8 money oid double
    tsquery tsvector point box"""
)
_TWO_WORDS = frozenset(
    {("double", "precision"), ("character", "varying"), ("char", "varying"), ("bit", "varying"),
     ("national", "character"), ("national", "char"), ("nchar", "varying"), ("national", "varchar")}
)  # fmt: skip
_FIELDS = names("year month day hour minute second")
_NOT_CALLS = names(
    """into table function procedure routine aggregate view references copy vacuum analyze only exists update sequence
    index trigger policy type domain truncate cluster lock"""
)
_CAN_FOLLOW_SOFT = frozenset({STRING, NUMBER, PARAM, IDENT, QUOTED})


class Operand:
    """Tokens [first, last] between two operators of the level."""

    __slots__ = ("call", "close", "evidence", "first", "inner", "last", "prefixes", "shape", "told")

    def __init__(self, first: int) -> None:
        self.first = first
        self.last = first
        self.close = -1  # the closing parenthesis of a group
        self.shape = ANYTHING
        self.call: Call | None = None
        #: Prefix operators: (token, is it `@>`). Each takes the rest of the operand.
        self.prefixes: list[tuple[int, bool]] = []
        #: Expressions in parentheses or in the branches of a CASE, which stand where this operand stands.
        self.inner: list[Chain] = []
        self.told = False  # a call whose first argument reads as a step
        self.evidence = NOTHING  # known once the expression is complete

    @property
    def loops(self) -> bool:
        """Whether `@>` stands before it, and may be ours."""
        return self.shape != NONTEXT and any(loop for _, loop in self.prefixes)

    @property
    def yields_future(self) -> bool:
        """Whether it is evidently the text of a future."""
        if self.evidence is not NOTHING:
            return self.evidence is Evidence.FUTURE
        if self.prefixes:
            return self.prefixes[0] == (self.first, True)
        if self.shape == CALL:
            return self.call is not None and self.call.name in BUILDERS
        return self.shape == GROUP and self.inner[0].yields_future


class Chain:
    """Operands joined by operators of one precedence, which group to the left."""

    __slots__ = ("bare", "claimed", "distinctive", "evidence", "flow", "operands", "ops", "yields_future")

    def __init__(self) -> None:
        self.operands: list[Operand] = []
        #: (first token, last token, operator); two tokens or more for OPERATOR(schema.op).
        self.ops: list[tuple[int, int, str]] = []
        #: No df call is around it, and nothing else in its statement says that operators are meant as ours.
        self.bare = False
        self.claimed = True  # its operators can be ours: an operand says so, or it is not bare
        self.evidence = NOTHING  # of the whole
        self.distinctive = False
        self.yields_future = False
        self.flow: Flow | None = None

    def nontext(self, index: int) -> bool:
        """Whether operator `index` has an operand that can't be text, so that it can't be ours."""
        return self.operands[index + 1].shape == NONTEXT or (index == 0 and self.operands[0].shape == NONTEXT)

    def untyped(self, index: int) -> bool:
        """Whether operator `index` is `&` or `|` between two literals: PostgreSQL has none without types."""
        return index == 0 and self.ops[0][2] in ("&", "|") \
            and all(o.shape == LITERAL and not o.prefixes for o in self.operands[:2])

    def judge(self) -> None:
        """What the operands say about a bare expression, whose operators group to the left."""
        left = self.operands[0].evidence
        claimed = False
        for index, (_, _, symbol) in enumerate(self.ops):
            right = self.operands[index + 1].evidence
            if symbol in DISTINCTIVE:
                ours = not self.nontext(index) and left.with_operator(right)
                claimed = claimed or ours
                left = Evidence.FUTURE if ours else NOTHING
            elif symbol in ("&", "|"):
                left = NOTHING if self.nontext(index) else left.beside(right)
                claimed = claimed or left is Evidence.FUTURE
            elif symbol == "||":
                left = left.continued(right)
            else:
                left = NOTHING
        self.claimed, self.evidence = claimed, left

    def settle(self) -> None:
        """Derive what the operators say about the whole, once it is complete."""
        if self.bare:
            self.judge()
        if not self.claimed:
            self.yields_future = self.evidence is Evidence.FUTURE
            return
        self.distinctive = any(o[2] in DISTINCTIVE and not self.nontext(i) for i, o in enumerate(self.ops))
        left = self.operands[0].yields_future
        for index, (_, _, symbol) in enumerate(self.ops):
            if symbol in DISTINCTIVE:
                left = not self.nontext(index)
            elif symbol in ("&", "|"):
                left = (self.distinctive or left or self.operands[index + 1].yields_future or self.untyped(index)) \
                    and not self.nontext(index)
            elif symbol != "||":
                left = False
        self.yields_future = left


@dataclass(slots=True)
class Argument:
    """One argument of a df call: tokens [first, last], its name if given, its expression if it is just that."""

    first: int
    last: int = -1
    name: str | None = None
    variadic: bool = False
    chain: Chain | None = None


@dataclass(slots=True)
class Call:
    """A call `df.name(...)`; `at` is the token of `df`."""

    name: str
    at: int
    checked: bool
    arguments: list[Argument] = field(default_factory=list)
    overloads: tuple[Function, ...] = ()
    flow: Flow | None = None


@dataclass(slots=True)
class Statement:
    """What a statement of interest is: routine, do, create extension, drop extension, definition, other."""

    kind: str
    first: int
    language: str | None = None
    body: int | None = None
    target: int | None = None


class Listener(Protocol):
    """What the compiler makes of what is found. Token indexes throughout."""

    def chain(self, chain: Chain, future: bool, column: bool = False) -> None:
        """An outermost expression.

        `future`: it stands where a df function takes a future; `column`: it is all of a column in a list of SELECT or
        RETURNING, and has no name.
        """

    def call_opened(self, call: Call) -> None:
        """A df call's parenthesis opened."""

    def call_closed(self, call: Call) -> None:
        """All arguments are known."""

    def dangling(self, token: int, symbol: str, side: str) -> None:
        """An operator has nothing on its `side`."""

    def dynamic(self, token: int) -> None:
        """A literal that PL/pgSQL executes."""

    def statement(self, statement: Statement, last: int) -> None:
        """A statement of interest ended with token `last`."""


TOP, PAREN, ARGUMENTS, BRACKET, CASE = range(5)


class Frame:
    """A bracket, or a CASE, that is open."""

    __slots__ = ("argument", "branch", "call", "chain", "columns", "expecting", "impure", "kind", "name_first", "open",
                 "operand", "owner", "tail")  # fmt: skip

    def __init__(self, kind: int, owner: Operand | None, at: int) -> None:
        self.kind = kind
        self.owner = owner
        self.open = at
        self.chain: Chain | None = None
        self.operand: Operand | None = None
        self.expecting = True  # an operand, rather than an operator
        self.tail = ANYTHING  # what the operand ended with: NAME, CALL
        self.name_first = 0
        self.impure = False  # holds more than one expression
        self.columns = False  # in the list of columns of SELECT or RETURNING
        self.branch = False  # in a CASE: after THEN or ELSE
        self.call: Call | None = None
        self.argument: Argument | None = None


class Scanner:
    """One pass over the tokens of one text."""

    def __init__(
        self, tokens: Tokens, listener: Listener, *, plpgsql: bool = False, claimed: bool = False,
        speaking: Iterable[int] = (),
    ) -> None:
        """`claimed`: the text stands where operators are ours; `speaking`: in these of its statements they are."""
        self._tokens = tokens
        self._kinds = tokens.kinds
        self._words = tokens.words
        self._count = len(tokens)
        self._listener = listener
        self._plpgsql = plpgsql
        self._frame = Frame(TOP, None, 0)
        self._stack: list[Frame] = []
        self._statement: Statement | None = None
        self._calls = 0  # df calls that are open
        self._claimed = claimed
        self._number = 0  # of the statement
        #: Statements that speak of workflows, as far as is known; those that have operators that were left alone.
        self.speaking = set(speaking)
        self.skipped: set[int] = set()

    @property
    def claimed(self) -> bool:
        """Whether the operators of the statement that is being read are ours."""
        return self._claimed or self._number in self.speaking

    def speak(self) -> None:
        """The statement that is being read speaks of workflows."""
        self.speaking.add(self._number)

    def skip(self) -> None:
        """Operators in it were left alone."""
        self.skipped.add(self._number)

    def run(self) -> bool:
        """Report everything; False if brackets don't match, so that nothing reported can be relied on."""
        kinds, words, count = self._kinds, self._words, self._count
        index = 0
        while index < count:
            kind = kinds[index]
            if kind == IDENT:
                index = self._word(index, words[index])
            elif kind == PUNCT:
                index = self._punctuation(index, words[index])
                if index < 0:
                    return False
            elif kind == STRING:
                index = self._string(index)
            elif kind == OP:
                index = self._operator(index, index, words[index])
            elif kind == TIGHT:
                index = self._tight(index, words[index])
            elif kind == QUOTED:
                self._start_name(index)
                index += 1
            elif kind in (NUMBER, PARAM):
                self._primary(index, NONTEXT if kind == NUMBER else ANYTHING)
                index += 1
            elif kind == COMPARE and words[index] == "=>":
                self._named(index)
                index += 1
            else:
                self._break(index)
                index += 1
        self._leave_cases(count)
        if self._stack:
            return False
        self._break(count)
        self._end_statement(count - 1)
        return True

    # What is between boundaries

    def _primary(self, index: int, shape: int) -> None:
        """An operand, or its last part, is the token."""
        frame = self._frame
        if not frame.expecting:
            self._break(index)
            frame = self._frame
        fresh = frame.operand is None
        operand = self._operand(index)
        if fresh or not self._has_body(operand, index):
            operand.shape = shape
        frame.expecting = False
        frame.tail = ANYTHING

    def _operand(self, index: int) -> Operand:
        """The operand under construction; a new one if there is none."""
        frame = self._frame
        operand = frame.operand
        if operand is None:
            if frame.chain is None:
                frame.chain = Chain()
            operand = frame.operand = Operand(index)
            frame.chain.operands.append(operand)
        return operand

    @staticmethod
    def _has_body(operand: Operand, index: int) -> bool:
        """Whether anything but prefix operators stands between the operand's start and `index`."""
        return index - operand.first != len(operand.prefixes)

    def _start_name(self, index: int) -> None:
        self._primary(index, NAME)
        frame = self._frame
        frame.name_first = index
        frame.tail = NAME

    def _word(self, index: int, word: str) -> int:
        frame = self._frame
        words = self._words
        if frame.kind == TOP and word == "language" and self._statement is not None and index + 1 < self._count:
            following = index + 1
            self._statement.language = self._tokens.text(following).strip("'\"").lower()
        if not frame.expecting:
            step = self._continuation(index, word)
            if step:
                return index + step
        if word == "case" and (index == 0 or words[index - 1] != "end"):
            self._open(index, CASE, None)
            return index + 1
        if frame.kind == CASE and word in ("when", "then", "else", "end"):
            self._case_word(index, word)
            return index + 1
        if word == "variadic" and frame.argument is not None and frame.chain is None:
            frame.argument.variadic = True
            return index + 1
        if self._is_boundary(index, word):
            self._break(index)
            self._frame.impure = True
            if word in _LISTS:
                self._frame.columns = True
            elif word in _AFTER_COLUMNS or word == "then":
                self._frame.columns = False
            return self._enter_statement(index, word)
        self._start_name(index)
        if word == "loop" and self._plpgsql:
            self._frame.columns = False
        return self._enter_statement(index, word)

    def _continuation(self, index: int, word: str) -> int:
        """How many tokens from `index` on still belong to the operand before them, or join another to it."""
        frame, words = self._frame, self._words
        operand = frame.operand
        assert operand is not None  # an operand ended, so there is one
        following = words[index + 1] if index + 1 < self._count else ""
        if word == "collate":
            return 2
        if word == "at" and following == "time":
            operand.shape = NONTEXT
            frame.expecting = True
            return 3
        if word == "at" and following == "local":
            operand.shape = NONTEXT
            return 2
        if word == "uescape":
            operand.shape = ANYTHING
            return 2
        if word == "operator" and following == "(":
            return self._qualified_operator(index)
        if frame.tail == CALL and word in ("over", "filter", "within"):
            operand.shape = ANYTHING
            if word == "over" and following != "(":
                return 2
            frame.expecting = True
            return 2 if word == "within" else 1
        if frame.tail == NAME:
            before = words[index - 1]
            if (before, word) in _TWO_WORDS:
                return 1
            if word in ("with", "without") and following == "time" and before in ("time", "timestamp"):
                return 3
        return 0

    def _qualified_operator(self, index: int) -> int:
        """`OPERATOR(schema.op)`: one operator of the level; 0 if it is not that."""
        last = index + 2
        while last < self._count and last < index + 8 and self._words[last] != ")":
            last += 1
        if last >= self._count or self._words[last] != ")" or self._kinds[last - 1] not in (OP, TIGHT, COMPARE):
            return 0
        symbol = self._words[last - 1]
        ours = self._words[index + 2 : last - 1] in ([], ["pg_catalog", "."]) and self._kinds[last - 1] == OP
        self._operator(index, last, symbol if ours else "OPERATOR")
        return last - index + 1

    def _is_boundary(self, index: int, word: str) -> bool:
        if word in BOUNDARIES:
            return True
        following = index + 1
        if word in JOIN_WORDS:
            return following >= self._count or self._words[following] != "("
        if word in INFIX:
            return not self._frame.expecting
        if word not in SOFT:
            return False
        before = self._words[index - 1] if index else ""
        if word == "by":
            return before in ("order", "group", "partition")
        if word in ("next", "query"):
            return before == "return"
        if self._starts_statement(index) or (following < self._count and self._kinds[following] in _CAN_FOLLOW_SOFT):
            return True
        if word == "execute":
            return before in ("query", "in", "for")
        statement = self._statement
        return word == "return" and self._frame.kind == TOP and statement is not None and statement.kind == "routine"

    def _starts_statement(self, index: int) -> bool:
        if index == 0:
            return True
        before = self._words[index - 1]
        if self._kinds[index - 1] == IDENT:
            return before in STATEMENT_OPENERS
        return before in (";", ">>")

    def _operator(self, first: int, last: int, symbol: str) -> int:
        frame = self._frame
        if frame.expecting:
            if symbol in DISTINCTIVE and frame.operand is None:
                if self._bare:
                    self.skip()
                else:
                    self._missing_left(first, symbol)
            self._operand(first).prefixes.append((first, symbol == LOOP))
            return last + 1
        assert frame.chain is not None
        assert frame.operand is not None
        frame.operand.last = first - 1
        frame.operand = None
        frame.chain.ops.append((first, last, symbol))
        frame.expecting = True
        return last + 1

    def _missing_left(self, index: int, symbol: str) -> None:
        """A binary operator of ours with nothing before it; not in lists of operators (DDL, ORDER BY ... USING)."""
        before = self._words[index - 1] if index else ""
        following = self._words[index + 1] if index + 1 < self._count else ";"
        if before in ("using", "with", "operator", "=", ".") or following in (")", ",", ";", "("):
            return
        self._listener.dangling(index, symbol, "left")

    def _tight(self, index: int, word: str) -> int:
        frame = self._frame
        if not frame.expecting:
            assert frame.operand is not None
            frame.operand.shape = NONTEXT
            frame.expecting = True
        elif word in "+-":
            self._operand(index).shape = NONTEXT
        elif word == "*":  # all columns
            self._primary(index, ANYTHING)
        else:
            self._break(index)
        return index + 1

    def _string(self, index: int) -> int:
        frame = self._frame
        before = self._words[index - 1] if index else ""
        statement = self._statement
        if statement is not None and frame.kind == TOP and (
            (statement.kind == "routine" and before == "as") or (statement.kind == "do" and before != "language")
        ):
            statement.body = index
        if self._plpgsql and before == "execute":
            following = self._words[index + 1] if index + 1 < self._count else ";"
            if following in (";", "into", "using", "loop", ")"):
                self._listener.dynamic(index)
        if not frame.expecting and frame.tail == NAME:  # a typed literal
            assert frame.operand is not None
            frame.operand.shape = NONTEXT if before in _NONTEXT_TYPES else ANYTHING
            frame.tail = ANYTHING
            return index + 1
        self._primary(index, LITERAL)
        return index + 1

    # Brackets

    def _punctuation(self, index: int, word: str) -> int:
        """The next index, or -1 when brackets don't match."""
        frame = self._frame
        if word in ("(", "["):
            self._bracket(index, word)
        elif word in (")", "]"):
            self._leave_cases(index)
            if not self._close(index, word):
                return -1
        elif word == ",":
            self._leave_cases(index)
            frame = self._frame
            if frame.kind == ARGUMENTS:
                self._end_argument(index)
                frame.argument = Argument(index + 1) if frame.call else None
            else:
                self._break(index)
                frame.impure = True
        elif word == ".":
            return self._dot(index)
        elif word == "::":
            return self._cast(index)
        elif word == ":=":
            self._named(index)
        elif word == ";":
            self._leave_cases(index)
            self._break(index)
            self._frame.columns = False
            if self._frame.kind == TOP:
                self._end_statement(index - 1)
            self._number += not self._plpgsql  # whose variables carry futures from statement to statement
        else:
            self._break(index)
        return index + 1

    def _bracket(self, index: int, word: str) -> None:
        frame = self._frame
        if word == "[":
            if not frame.expecting and frame.operand is not None:
                frame.operand.shape = ANYTHING
            self._open(index, BRACKET, None)
            return
        if not frame.expecting and frame.tail == NAME:
            call = self._df_call(index, frame)
            self._open(index, ARGUMENTS, call)
            if call is not None:
                self._calls += 1
                self._frame.argument = Argument(index + 1)
                self._listener.call_opened(call)
            return
        if not frame.expecting:
            self._break(index)
        self._open(index, PAREN, None)

    def _df_call(self, index: int, frame: Frame) -> Call | None:
        first = frame.name_first
        if index - first != 3 or self._words[first] not in ("df", '"df'):
            return None
        before = self._words[first - 1] if first and self._kinds[first - 1] == IDENT else ""
        statement = self._statement
        if before in _NOT_CALLS or (statement is not None and statement.kind == "definition"):
            return None
        name = self._words[index - 1].removeprefix('"')
        if name not in NEUTRAL:
            self.speak()
        return Call(name, first, name in FUNCTIONS, overloads=FUNCTIONS.get(name, ()))

    def _open(self, index: int, kind: int, call: Call | None) -> None:
        if kind in (PAREN, CASE):
            if not self._frame.expecting:
                self._break(index)
            operand = self._operand(index)
            if not self._has_body(operand, index):
                operand.shape = GROUP if kind == PAREN else CASED
        else:
            operand = self._operand(index)
        self._stack.append(self._frame)
        self._frame = Frame(kind, operand, index)
        self._frame.call = call

    def _close(self, index: int, word: str) -> bool:
        frame = self._frame
        if not self._stack or (frame.kind == BRACKET) != (word == "]"):
            return False
        owner = frame.owner
        assert owner is not None
        outer = self._stack.pop()
        tail = ANYTHING
        if frame.kind == PAREN:
            owner.close = index
            if frame.open and self._words[frame.open - 1] in ("filter", "group"):
                tail = CALL  # OVER may follow
            chain = self._end_chain(index)
            if chain is not None and not frame.impure:
                owner.inner.append(chain)
            else:
                if chain is not None:
                    self._listener.chain(chain, False, self._is_column(frame, chain, index))
                if owner.shape == GROUP:
                    owner.shape = ANYTHING
        elif frame.kind == ARGUMENTS:
            if frame.call is not None and frame.argument is not None and frame.argument.first == index:
                frame.argument = None  # no arguments at all
            self._end_argument(index)
            tail = CALL
            if owner.shape == NAME:
                owner.shape = ANYTHING
            if frame.call is None:
                first = frame.open + 1
                owner.told = self._kinds[first] == STRING and reads_as_step(self._tokens, first)
            else:
                self._calls -= 1
                if not self._has_body(owner, frame.call.at):
                    owner.shape, owner.call = CALL, frame.call
                self._listener.call_closed(frame.call)
        else:
            self._break(index)
        self._frame = outer
        outer.expecting = False
        outer.tail = tail
        return True

    def _end_argument(self, index: int) -> None:
        frame = self._frame
        chain = self._end_chain(index)
        argument, call = frame.argument, frame.call
        future = False
        if argument is not None and call is not None:
            argument.last = index - 1
            call.arguments.append(argument)
            if not frame.impure and not argument.variadic:
                argument.chain = chain
                future = _takes_future(call, argument)
        if chain is not None:
            self._listener.chain(chain, future)
        frame.impure = False

    def _named(self, index: int) -> None:
        """`name =>` before an argument; anywhere else (`x := ...`) just a boundary."""
        frame = self._frame
        argument = frame.argument
        if argument is not None and argument.name is None and index == argument.first + 1 and frame.tail == NAME:
            argument.name = self._words[argument.first]
            frame.chain = frame.operand = None
            frame.expecting, frame.tail = True, ANYTHING
            return
        self._break(index)

    def _dot(self, index: int) -> int:
        frame = self._frame
        if frame.expecting or index + 1 >= self._count:
            self._break(index)
            return index + 1
        assert frame.operand is not None
        if frame.operand.shape != NAME:
            frame.operand.shape = ANYTHING
        return index + 2

    def _cast(self, index: int) -> int:
        """Skip the type after `::`."""
        frame, words, count = self._frame, self._words, self._count
        at = index + 1
        if frame.expecting or at >= count or self._kinds[at] not in (IDENT, QUOTED):
            self._break(index)
            return at
        operand = frame.operand
        assert operand is not None
        name = words[at]
        at += 1
        while at + 1 < count and words[at] == "." and self._kinds[at] == PUNCT:
            name = words[at + 1] if name == "pg_catalog" else ""
            at += 2
        while at < count and (words[at - 1], words[at]) in _TWO_WORDS:
            name = "varchar" if words[at] == "varying" and name != "bit" else name
            at += 1
        at = self._skip_bracket(at, "(", ")")
        if at + 2 < count and words[at] in ("with", "without") and words[at + 1] == "time" and words[at + 2] == "zone":
            at += 3
        if name == "interval":
            while at < count and (words[at] in _FIELDS or (words[at] == "to" and words[at - 1] in _FIELDS)):
                at += 1
            at = self._skip_bracket(at, "(", ")")
        array = at
        if at < count and words[at] == "array" and self._kinds[at] == IDENT:
            at += 1
        while at < count and words[at] == "[" and self._kinds[at] == PUNCT:
            after = self._skip_bracket(at, "[", "]")
            if after == at:
                break
            at = after
        if at != array:
            operand.shape = ANYTHING
        elif name not in _TEXT_TYPES:
            operand.shape = NONTEXT if name in _NONTEXT_TYPES else ANYTHING
        elif operand.shape == NONTEXT:
            operand.shape = ANYTHING
        frame.tail = ANYTHING
        return at

    def _skip_bracket(self, at: int, opening: str, closing: str) -> int:
        """Past a type's modifiers or bounds (numbers and commas), if that is what stands here."""
        if at >= self._count or self._words[at] != opening or self._kinds[at] != PUNCT:
            return at
        end = at + 1
        while end < self._count and (self._kinds[end] == NUMBER or self._words[end] == ","):
            end += 1
        return end + 1 if end < self._count and self._words[end] == closing else at

    def _case_word(self, index: int, word: str) -> None:
        """WHEN, THEN, ELSE, END of the CASE that is open. What a branch yields stands where the CASE stands."""
        frame = self._frame
        chain = self._end_chain(index)
        if chain is not None:
            assert frame.owner is not None
            if frame.branch and not frame.impure:
                frame.owner.inner.append(chain)
            else:
                self._listener.chain(chain, False)
        frame.impure = False
        frame.branch = word in ("then", "else")
        if word == "end":
            self._frame = self._stack.pop()
            self._frame.expecting = False
            self._frame.tail = ANYTHING

    def _leave_cases(self, index: int) -> None:
        """PL/pgSQL's CASE statement looks like an expression until its first semicolon."""
        while self._frame.kind == CASE:
            self._break(index)
            self._frame = self._stack.pop()
            self._drop_expression()

    # Ends of expressions and statements

    def _break(self, index: int) -> None:
        """The expression ends before token `index`, and what follows is no part of it."""
        frame = self._frame
        chain = self._end_chain(index)
        if chain is not None:
            frame.impure = True
            self._listener.chain(chain, False, self._is_column(frame, chain, index))

    def _is_column(self, frame: Frame, chain: Chain, index: int) -> bool:
        """Whether the expression, which ends before token `index`, is all of a column, without a name."""
        first = chain.operands[0].first
        if not frame.columns or first == 0 or self._words[first - 1] not in _BEFORE_COLUMN:
            return False
        if index >= self._count:
            return True
        following, kind = self._words[index], self._kinds[index]
        if kind == PUNCT:
            return following in (",", ";", ")")
        return kind == IDENT and (following in _AFTER_COLUMNS or (following == "loop" and self._plpgsql))

    def _end_chain(self, index: int) -> Chain | None:
        frame = self._frame
        chain, operand, expecting = frame.chain, frame.operand, frame.expecting
        frame.chain = frame.operand = None
        frame.expecting, frame.tail = True, ANYTHING
        if chain is None:
            return None
        if operand is not None:
            operand.last = index - 1
        chain.bare = self._bare
        if chain.bare:
            self._weigh(chain, frame.kind)
        if expecting:
            return self._unfinished(chain, operand, index)
        chain.settle()
        if chain.bare and (chain.claimed or any(o.loops and o.evidence for o in chain.operands)):
            self.speak()
        elif chain.bare and (any(o[2] in DISTINCTIVE for o in chain.ops) or any(o.loops for o in chain.operands)
                             or (chain.ops and chain.untyped(0))):
            self.skip()
        return chain

    @property
    def _bare(self) -> bool:
        return not self._calls and not self.claimed

    def _weigh(self, chain: Chain, kind: int) -> None:
        """What each operand of a bare expression says, where it matters."""
        inner = kind in (PAREN, CASE)
        if not inner and not chain.ops and not chain.operands[0].prefixes:
            return
        for operand in chain.operands:
            operand.evidence = self._evidence(operand)

    def _evidence(self, operand: Operand) -> Evidence:
        found = NOTHING
        if operand.shape == LITERAL:
            step = reads_as_step(self._tokens, operand.first + len(operand.prefixes))
            found = Evidence.STEP if step else Evidence.TEXT
        elif operand.shape == GROUP:
            found = operand.inner[0].evidence
        elif operand.shape == CASED and operand.inner:
            branches = [chain.evidence for chain in operand.inner]
            found = max(branches) if max(branches) >= Evidence.STEP else min(branches)
        elif operand.shape == CALL and operand.call is not None and operand.call.name in BUILDERS:
            found = Evidence.FUTURE
        elif operand.shape == ANYTHING and operand.told:
            found = Evidence.STEP
        if operand.prefixes:  # of something else: there is no telling what it makes of its operand
            return Evidence.FUTURE if found and all(loop for _, loop in operand.prefixes) else NOTHING
        return found

    def _unfinished(self, chain: Chain, operand: Operand | None, index: int) -> Chain | None:
        """An operator has nothing on its right: an error if it can only be ours."""
        following = self._words[index] if index < self._count else ";"
        if chain.bare and not chain.operands[0].evidence:
            self.skip()
            return None  # the server will say what it thinks of it
        if operand is None and chain.ops:
            token, _, symbol = chain.ops[-1]
            if symbol in DISTINCTIVE and not (chain.ops[:-1] == [] and chain.operands[0].shape == NONTEXT):
                self._listener.dangling(token, symbol, "right")
        elif operand is not None and operand.prefixes and operand.prefixes[-1][0] == index - 1:
            token, loop = operand.prefixes[-1]
            in_call = self._frame.call is not None and following in (")", ",")
            if loop and (in_call or len(chain.operands) > 1):
                self._listener.dangling(token, LOOP, "right")
        return None

    def _end_statement(self, last: int) -> None:
        statement, self._statement = self._statement, None
        if statement is not None:
            self._listener.statement(statement, last)

    def _enter_statement(self, index: int, word: str) -> int:
        """The index after `word`, or after the whole statement if operators in it are names, not expressions."""
        if word not in _HEADS or self._statement is not None or not self._starts_statement(index):
            return index + 1
        self._statement = self._head(index, word)
        if self._statement is not None and "operator" in self._words[index + 1 : index + 5]:
            while index < self._count and self._words[index] != ";":
                index += 1
            self._drop_expression()
            return index
        return index + 1

    def _drop_expression(self) -> None:
        frame = self._frame
        frame.chain = frame.operand = None
        frame.expecting, frame.tail = True, ANYTHING

    def _head(self, index: int, word: str) -> Statement | None:
        """What kind of statement begins here, from its first words."""
        words = self._words
        following = words[index + 1 : index + 9]
        if word == "do":
            return Statement("do", index)
        if word == "create":
            if following[:2] == ["or", "replace"]:
                following = following[2:]
            if following[:1] in (["function"], ["procedure"]):
                return Statement("routine", index)
        if word in ("create", "drop") and following[:1] == ["extension"]:
            at = index + 2
            while at < self._count and words[at] in ("if", "not", "exists"):
                at += 1
            while at < self._count and words[at] != ";":
                if words[at] in ("pg_durable", '"pg_durable'):
                    return Statement(f"{word} extension", index, target=at)
                if word == "create":
                    break
                at += 1
            return Statement("other", index)
        if word == "create" and not {"operator", "index"} & set(following[:4]):
            return None
        return Statement("definition", index)


#: Words that begin a list of columns, and that may stand between them and a column; words that may follow the list.
_LISTS = names("select returning")
_BEFORE_COLUMN = _LISTS | names("all distinct") | {","}
_AFTER_COLUMNS = names(
    "from into where group having window union except intersect order limit offset fetch for on returning with")
_HEADS = names("create do drop alter comment grant revoke security")


def _takes_future(call: Call, argument: Argument) -> bool:
    """Whether the argument stands for a parameter that takes a future."""
    position = len(call.arguments) - 1
    for function in call.overloads:
        parameters = function.parameters
        if argument.name is not None:
            if argument.name in function.futures:
                return True
        elif parameters:
            parameter = parameters[position] if position < len(parameters) else parameters[-1]
            if parameter.name in function.futures and (position < len(parameters) or parameter.variadic):
                return True
    return False
