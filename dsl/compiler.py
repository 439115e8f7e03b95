"""From SQL with DSL operators to plain SQL (DESIGN "Data flow of one statement").

`mentions_dsl` picks statements by their bytes; `compile_sql` rewrites them. Operators become calls of df functions
by inserting a head before the expression, a comma in the place of each operator and a parenthesis after each
right operand: every other character stays where it is, line breaks too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from dsl import checks, reading, steptext
from dsl.checks import CompileError, CompileFault
from dsl.dialect import DISTINCTIVE, LOOP, PARAM, STRING, Literal, Tokens, lex, literal
from dsl.flow import Flow
from dsl.reading import CompileWarning
from dsl.scanner import (
    CALL,
    CASED,
    GROUP,
    LITERAL,
    NAME,
    NONTEXT,
    Argument,
    Call,
    Chain,
    Operand,
    Scanner,
    Statement,
)
from dsl.sourcemap import CLOSE, OPEN, REPLACE, Edit, SourceMap, apply
from dsl.substitute import references
from dsl.surface import FUNCTIONS

__all__ = ["CompileError", "CompileWarning", "Compiled", "compile_sql", "mentions_dsl", "might_mention_dsl"]

#: Bodies within bodies (DO in a function in DO ...) are looked into this deep: each level reads its text again.
MAX_BODY_DEPTH = 24

_DF_CALL = re.compile(rb'(?<![a-z0-9_$\x80-\xff])df"?[ \t\r\n\f\v]*\.')
#: Prefix `@>`: nothing that could be its left operand stands before it. `data @> '{}'` must not count.
_NO_OPERAND = b"(,=>[;:&|~/"
_NO_OPERAND_WORD = re.compile(
    rb"(?<![a-z0-9_$\x80-\xff])(?:select|return|next|then|else|when|values|default|by|and|or|not|in|distinct|all|as|using"
    rb"|perform|assert|returning|set|on|where|having|case|if|elsif|while|begin|is|like)\Z"
)
_BEFORE_LOOP = 64


def might_mention_dsl(data: bytes) -> bool:
    """Whether anything in `data`, which may be whole messages with many texts, needs `mentions_dsl`: False is final.

    Searches that run at memory speed, on every byte that clients send: every way to mention the DSL has a `>`, a `df`
    or `pg_durable` in it. `find`, since `in` first tries whether its operand is a number, by raising an exception.
    """
    if data.find(b">") >= 0:
        return True
    lower = data.lower()
    return lower.find(b"df") >= 0 or lower.find(b"pg_durable") >= 0


def mentions_dsl(statement: bytes) -> bool:
    """Whether the statement may be ours: a byte search.

    True too often costs a tokenisation, False is final. `&` and `|` alone never count: only calls of df functions
    give them a meaning here. Plain substring searches come first, for they are much faster than a pattern.
    """
    if not might_mention_dsl(statement):
        return False
    find = statement.find
    if find(b"~>") >= 0 or find(b"?>") >= 0 or find(b"!>") >= 0 or find(b"|=>") >= 0:
        return True
    lower = statement.lower()
    find = lower.find
    if (find(b"df") >= 0 and _DF_CALL.search(lower) is not None) or find(b"pg_durable") >= 0:
        return True
    at = find(b"@>")
    while at >= 0:
        before = lower[max(0, at - _BEFORE_LOOP) : at].rstrip(b" \t\r\n\f\v")
        if not before or before[-1] in _NO_OPERAND or _NO_OPERAND_WORD.search(before, max(0, len(before) - 12)):
            return True
        at = find(b"@>", at + 2)
    return False


def _mentions(text: str) -> bool:
    """The same for text."""
    return mentions_dsl(text.encode("utf-8", "surrogatepass"))


@dataclass(frozen=True, slots=True)
class Compiled:
    """A rewritten statement text."""

    sql: str
    source_map: SourceMap
    warnings: tuple[CompileWarning, ...] = ()
    error: CompileError | None = None

    def raises(self, position: int) -> bool:
        """Whether the error or a warning at this position (of the text that it was made from) is raised by `sql`."""
        return any(found.position == position for found in (self.error, *self.warnings) if found is not None)

    def source_position(self, position: int) -> int:
        """1-based position (characters) in `sql` -> 1-based position in the text it was made from."""
        if self.error is not None:
            return self.error.position
        return self.source_map.source_position(position)


def compile_sql(sql: str, *, standard_conforming_strings: bool = True) -> Compiled | None:
    """Compile the DSL away. None when nothing has to change, or when PostgreSQL had better judge the text itself.

    An error in the DSL gives a text that raises it (`Compiled.error` says which): nothing is raised here.
    """
    if not _mentions(sql):
        return None  # so that both always agree on what is ours, also for text that is no SQL at all
    tokens = lex(sql, standard_conforming_strings=standard_conforming_strings)
    if tokens is None or not _relevant(tokens):
        return None
    warnings: list[CompileWarning] = []
    try:
        edits = _Fragment(sql, tokens, warnings).edits()
    except CompileFault as fault:
        error = fault.error
        parameters = max((int(tokens.text(i)[1:]) for i, k in enumerate(tokens.kinds) if k == PARAM), default=0)
        # More parameters than the protocol can carry: the server will say so.
        text = reading.error_statement(error, sql, parameters if parameters < 65536 else 0)
        return Compiled(text, SourceMap(len(sql)), tuple(warnings), error)
    if not edits:
        return None
    text, source_map = apply(sql, edits)
    return Compiled(text, source_map, tuple(warnings))


def _relevant(tokens: Tokens) -> bool:
    """Whether any token (not a comment, not a literal that is no code) can be ours."""
    kinds, words = tokens.kinds, tokens.words
    present = set(words)
    if DISTINCTIVE & present or LOOP in present:
        return True
    if "df" in present or '"df' in present:
        for index, word in enumerate(words):
            if word in ("df", '"df') and index + 3 < len(words) and words[index + 3] == "(":
                return True
    if "extension" in present and ("pg_durable" in present or '"pg_durable' in present):
        return True
    if present & {"do", "function", "procedure", "execute"}:
        return any(k == STRING and _mentions(tokens.text(i)) for i, k in enumerate(kinds))
    return False


#: What begins the call that an operator stands for, once its right operand is known.
_CALLS = {"~>": "df.seq(", "|=>": "df.as(", "&": "df.join(", "|": "df.race(", "!>": "df.if("}
_NO_PARTIAL = (
    "Invalid if-then-else: left side of !> must be a ?> expression",
    "Write condition ?> then !> else, with parentheses around a branch of several steps.",
    "42601",
)
_BREAK_OUTSIDE = (
    "df.break() was called outside of a loop. df.break() may only be used inside df.loop().",
    "Put the steps and the break inside df.loop(...) or @> (...).",
    "42601",
)
#: What is expected where an expression stands: nothing in particular; text, maybe a future's; a future.
_ANY, _TEXT, _FUTURE = range(3)
#: What may stand beside a step's literal; None is the end of the expression.
_AROUND_STEPS = frozenset({"~>", "|=>", "&", "|", "?>", "!>", None})
#: So many steps are doubted in one statement.
MAX_DOUBTS = 3
_LANGUAGES = {"sql": False, "plpgsql": True}


def _steps_of(call: Call) -> list[Chain]:
    """The arguments of a call that are futures."""
    bound = checks.bind(call.name, [(a.name, a.variadic) for a in call.arguments]) if call.checked else None
    if not isinstance(bound, dict):
        return []
    futures = {name for function in FUNCTIONS[call.name] for name in function.futures} | {"query"}
    return [a.chain for i, a in enumerate(call.arguments)
            if bound[i] in futures and a.chain is not None and not a.variadic]


def _partial_within(operand: Operand) -> tuple[Chain, list[Operand]] | None:
    """The `c ?> t` that the operand is, in parentheses, and those parentheses from the outside in."""
    groups: list[Operand] = []
    while operand.shape == GROUP and not operand.prefixes and operand.last == operand.close:
        groups.append(operand)
        chain = operand.inner[0]
        if chain.ops:
            last = len(chain.ops) - 1
            return (chain, groups) if chain.ops[last][2] == "?>" and not chain.nontext(last) else None
        operand = chain.operands[0]
    return None


def _is_operation(chain: Chain) -> bool:
    """Whether an operator, in whatever parentheses, is what the expression does last: its column has no name then."""
    while not chain.ops:
        operand = chain.operands[0]
        if operand.prefixes:
            return True
        if operand.shape != GROUP or operand.last != operand.close:
            return False
        chain = operand.inner[0]
    return True


def _foreign(chain: Chain) -> bool:
    """Whether half a condition is all that makes the chain look like ours: others have a `?>` too (RDKit has)."""
    found = [symbol for _, _, symbol in chain.ops if symbol in DISTINCTIVE]
    if len(found) != 1 or found[0] not in ("?>", "!>"):
        return False
    return not any(o.yields_future for o in chain.operands) and _partial_within(chain.operands[0]) is None


class _Fragment:
    """One text: a statement string, a routine's body, or the literal of df.explain. Listens to the scanner."""

    def __init__(
        self,
        sql: str,
        tokens: Tokens,
        warnings: list[CompileWarning],
        *,
        plpgsql: bool = False,
        depth: int = 0,
        position: Callable[[int], int] = lambda offset: offset + 1,
        outermost: str | None = None,
        claimed: bool = False,
    ) -> None:
        self._sql = sql
        self._tokens = tokens
        self._starts = tokens.starts
        self._ends = tokens.ends
        self.warnings = warnings
        self._plpgsql = plpgsql
        self._depth = depth
        self._position = position  # offset in this text -> 1-based position in the client's
        self._outermost = sql if outermost is None else outermost
        self._edits: list[Edit] = []
        self._literals: dict[int, Literal | None] = {}  # by token
        self._claimed = claimed
        self._scanner = Scanner(tokens, self, plpgsql=plpgsql, claimed=claimed)
        self.sorted: list[Edit] = []  # of a fragment within another
        self._within: dict[tuple[int, bool], _Fragment | None] = {}  # what literals hold, by token

    @property
    def skipped(self) -> bool:
        """Whether operators were left alone because nothing says that they are ours."""
        return bool(self._scanner.skipped)

    @property
    def speaks(self) -> bool:
        """Whether it speaks of workflows."""
        return bool(self._scanner.speaking)

    def edits(self) -> list[Edit]:
        """What has to change, in offsets of this text. Raises CompileFault."""
        warned = len(self.warnings)
        if not self._scanner.run():
            return []
        speaking = self._scanner.speaking
        if speaking & self._scanner.skipped:  # what makes them speak came after what was skipped
            self._edits = []
            del self.warnings[warned:]
            self._scanner = Scanner(
                self._tokens, self, plpgsql=self._plpgsql, claimed=self._claimed, speaking=speaking)
            self._scanner.run()
        return self._edits

    # Editing and reporting

    def _edit(self, start: int, end: int, text: str, anchor: int, rank: int) -> None:
        self._edits.append(Edit(start, end, text, anchor, rank, len(self._edits)))

    def _replace(self, first: int, last: int, text: str) -> None:
        start = self._starts[first]
        self._edit(start, self._ends[last], text, start, REPLACE)

    def _comma(self, left: int, first: int, last: int) -> None:
        """Put a comma in the place of an operator, close to the operand before it."""
        start, gap = self._starts[first], self._ends[left]
        blank = not self._sql[gap:start].strip(" \t")
        self._edit(gap if blank else start, self._ends[last], ",", start, REPLACE)

    def _wrap(self, warning: CompileWarning, first: int, last: int) -> None:
        """Make the expression of tokens [first, last] raise a warning."""
        self.warnings.append(warning)
        before, after = reading.warning_call(warning)
        start, end = self._starts[first], self._ends[last]
        self._edit(start, start, before, start, OPEN)
        self._edit(end, end, after, start, CLOSE)

    def _at(self, token: int) -> int:
        return self._position(self._starts[token])

    def _fail(self, fault: checks.Fault, token: int) -> None:
        message, hint, sqlstate = fault
        raise CompileFault(CompileError(sqlstate, message, hint, position=self._at(token)))

    def _text(self, first: int, last: int) -> str:
        return reading.excerpt(self._sql[self._starts[first] : self._ends[last]])

    def _literal(self, token: int) -> Literal | None:
        if token not in self._literals:
            self._literals[token] = literal(
                self._tokens.text(token), standard_conforming_strings=self._tokens.conforming)
        return self._literals[token]

    # Listener

    def dangling(self, token: int, symbol: str, side: str) -> None:
        """See `scanner.Listener`."""
        self._fail((f'nothing stands on the {side} of "{symbol}"', None, "42601"), token)

    def chain(self, chain: Chain, future: bool, column: bool = False) -> None:
        """See `scanner.Listener`. Outer expressions decide what `&` in their parentheses means, so top-down first."""
        before = len(self._edits)
        todo = [(chain, _FUTURE if future else _ANY, False)]
        visited: list[Chain] = []
        while todo:
            part, expected, partial = todo.pop()
            visited.append(part)
            todo.extend(self._emit(part, expected, partial))
        if future:
            for part in reversed(visited):
                part.flow = self._chain_flow(part)
        if column and len(self._edits) > before and _is_operation(chain):
            # PostgreSQL would name the column after the function that stands for the operator now.
            start, end = self._starts[chain.operands[0].first], self._ends[chain.operands[-1].last]
            self._edit(end, end, ' AS "?column?"', start, CLOSE)

    def _emit(self, chain: Chain, expected: int, partial_allowed: bool) -> list[tuple[Chain, int, bool]]:
        """Edits for one chain; what remains to be done for the expressions inside its operands."""
        operands = chain.operands
        roles = self._roles(chain, expected, partial_allowed)
        inner: list[tuple[Chain, int, bool]] = []
        unwrapped = self._unwrap_partial(chain, roles)
        for index, operand in enumerate(operands):
            role = roles[max(index - 1, 0)] if roles else None
            takes = _ANY
            loops = operand.loops and bool(expected or role or operand.evidence or not chain.bare)
            if loops:
                self._loops(operand)
            if operand.shape in (GROUP, CASED):
                if role is not None or (loops and operand.prefixes[0] == (operand.first, True)):
                    takes = _FUTURE
                elif not roles:
                    takes = expected
                elif (expected or any(roles)) and chain.ops[max(index - 1, 0)][2] == "||":
                    takes = _TEXT
            if index or unwrapped is None:
                inner += [(c, takes, False) for c in operand.inner]
        if unwrapped is not None:
            inner.append((unwrapped, _FUTURE, True))
        if any(roles):
            self._rewrite(chain, roles)
        return inner

    def _roles(self, chain: Chain, expected: int, partial_allowed: bool) -> list[str | None]:
        """For each operator of the chain, itself if it is ours, else None. Checks that `?>` and `!>` pair up."""
        operands = chain.operands
        roles: list[str | None] = []
        if expected == _ANY and (not chain.claimed or _foreign(chain)):
            return [None] * len(chain.ops)
        left = operands[0].yields_future
        pending: int | None = None
        for index, (token, _, symbol) in enumerate(chain.ops):
            role = None
            if symbol in DISTINCTIVE:
                role = None if chain.nontext(index) else symbol
            elif symbol in ("&", "|"):
                futures = expected == _FUTURE or chain.distinctive or left or operands[index + 1].yields_future \
                    or chain.untyped(index)
                if expected == _TEXT and not futures:  # 'n = ' || (a & b) may well be about numbers
                    futures = LITERAL in (operands[index].shape, operands[index + 1].shape)
                role = symbol if futures and not chain.nontext(index) else None
            if pending is not None and role != "!>":
                self._broken_if(chain, pending)
            if role == "!>" and pending is None and not (index == 0 and _partial_within(operands[0])):
                self._fail(_NO_PARTIAL, token)
            pending = index if role == "?>" else None
            left = role is not None or (left and symbol == "||")
            roles.append(role)
        if pending is not None and not partial_allowed:
            self._broken_if(chain, pending)
        # What stands left of an operator of ours is a future too: 'a' & 'b' & df.sql('c').
        for index in range(len(roles) - 2, -1, -1):
            symbol = chain.ops[index][2]
            if roles[index + 1] is not None and symbol in ("&", "|") and not chain.nontext(index):
                roles[index] = symbol
        return roles

    def _broken_if(self, chain: Chain, index: int) -> None:
        """`c ?> t` is followed by something else than `!>`."""
        token = chain.ops[index][0]
        later = [i for i, op in enumerate(chain.ops) if i > index and op[2] == "!>"]
        then, first = chain.operands[index + 1], chain.operands[0]
        condition = self._text(first.first, chain.operands[index].last)
        if later:
            found = later[0]
            middle = self._text(then.first, chain.operands[found].last)
            other = self._text(chain.operands[found + 1].first, chain.operands[found + 1].last)
            read = self._text(first.first, chain.operands[found].last)
            hint = f"It was read as ({read}) !> {other}. Write {condition} ?> ({middle}) !> {other}."
            self._fail((_NO_PARTIAL[0], hint, "42601"), chain.ops[found][0])
        body = self._text(then.first, then.last)
        self._fail(('"?>" is not followed by its "!>"',
                    f"Write {condition} ?> {body} !> '...', with parentheses around a branch of several steps.",
                    "42601"), token)  # fmt: skip

    def _unwrap_partial(self, chain: Chain, roles: list[str | None]) -> Chain | None:
        """For `(c ?> t) !> e`: remove the parentheses, so that the three become arguments of one call."""
        if not roles or roles[0] != "!>":
            return None
        found = _partial_within(chain.operands[0])
        if found is None:
            return None
        partial, groups = found
        for group in groups:
            self._replace(group.first, group.first, "")
            self._replace(group.last, group.last, "")
        return partial

    def _rewrite(self, chain: Chain, roles: list[str | None]) -> None:
        """Turn the operators that are ours into calls, and wrap what needs a warning."""
        operands = chain.operands
        first = operands[0].first
        start = self._starts[first]
        openings: list[str] = []
        anchor = start
        warned: set[str] = set()
        sequence = False
        previous: str | None = None
        for index, (token, last, symbol) in enumerate(chain.ops):
            role = roles[index]
            right = operands[index + 1]
            end = self._ends[right.last]
            if role is not None:
                anchor = self._starts[token]
                self._comma(operands[index].last, token, last)
                if role != "?>":
                    openings.append(_CALLS[role])
                    self._edit(end, end, ")", anchor, CLOSE)
                if role == "|=>":
                    self._check_name(right)
            warning = self._surprise(chain, roles, index, symbol, previous, sequence)
            if warning is not None and warning[0] not in warned:
                warned.add(warning[0])
                self.warnings.append(warning[1])
                before, after = reading.warning_call(warning[1])
                openings.append(before)
                self._edit(end, end, after, anchor, CLOSE)
            sequence = sequence or role == "~>"
            previous = role
        self._edit(start, start, "".join(reversed(openings)), anchor, OPEN)

    def _surprise(
        self, chain: Chain, roles: list[str | None], index: int, symbol: str, previous: str | None, sequence: bool
    ) -> tuple[str, CompileWarning] | None:
        """A warning, and its kind, for what operator `index` does to what stands left of it."""
        role = roles[index]
        operands = chain.operands
        operand, right = operands[index], operands[index + 1]
        position = self._at(chain.ops[index][0])
        # A warning goes around a finished call: not between ?> and !>, and not around what `||` makes of one.
        if role in ("&", "|") and sequence:
            left, before, branch = self._parts(chain, index)
            return "branches", reading.branches_follow(
                left, role, before, branch, self._text(right.first, right.last), position)  # fmt: skip
        if role == "|=>" and previous in ("&", "|"):
            left, before, branch = self._parts(chain, index)
            return "name", reading.name_follows(
                left, previous, before, branch, self._text(right.first, right.last), position)  # fmt: skip
        if role == "~>" or (role == "!>" and index and previous == "?>"):
            looping = operand if role == "~>" else operands[index - 1]
            if looping.prefixes and looping.prefixes[0] == (looping.first, True) and looping.shape != GROUP:
                body = self._text(looping.first + 1, looping.last)
                next_symbol = "~>" if role == "~>" else "?>"
                following = right if role == "~>" else operand
                return "loop", reading.loop_ends(
                    body, next_symbol, self._text(following.first, following.last), position)  # fmt: skip
        if symbol == "||" and previous is not None:
            left, before, branch = self._parts(chain, index)
            return "concatenation", reading.concatenation(
                left, before, branch, self._text(right.first, right.last), position)  # fmt: skip
        return None

    def _parts(self, chain: Chain, index: int) -> tuple[str, str, str]:
        """For a message about operator `index`: all to its left, all to the left of its left operand, that operand."""
        operand, first = chain.operands[index], chain.operands[0].first
        before = self._text(first, chain.ops[index - 1][1]) if index else ""
        return self._text(first, operand.last), before, self._text(operand.first, operand.last)

    def _check_name(self, operand: Operand) -> None:
        if operand.shape != LITERAL or operand.prefixes:
            return
        value = self._constant(operand)
        fault = checks.result_name(value) if value is not None else None
        if fault is not None:
            self._fail(fault, operand.first)

    def _loops(self, operand: Operand) -> None:
        end = self._ends[operand.last]
        # PL/pgSQL would end FOR ... IN SELECT df.loop(...) LOOP at the first LOOP that is not quoted.
        head = 'df."loop"(' if self._plpgsql else "df.loop("
        for token, loop in operand.prefixes:
            if loop:
                start, stop, following = self._starts[token], self._ends[token], self._starts[token + 1]
                stop = stop if self._sql[stop:following].strip(" \t") else following
                self._edit(start, stop, head, start, REPLACE)
                self._edit(end, end, ")", start, CLOSE)

    # Calls

    def call_opened(self, call: Call) -> None:
        """See `scanner.Listener`."""
        if not call.checked:
            fault = checks.unknown_function(call.name)
            if fault is not None:
                self._fail(fault, call.at)

    def call_closed(self, call: Call) -> None:
        """See `scanner.Listener`."""
        if not call.checked:
            return
        arguments = call.arguments
        if any(a.first == a.last and self._tokens.words[a.first] == "*" for a in arguments):
            return
        bound = checks.bind(call.name, [(a.name, a.variadic) for a in arguments])
        if not isinstance(bound, dict):
            self._fail(bound, call.at)
            return
        named: dict[str, Argument] = {}
        for index, argument in enumerate(arguments):
            named.setdefault(bound[index], argument)
            check = checks.CONSTANTS.get((call.name, bound[index]))
            value = self._argument_constant(argument) if check is not None else None
            if check is not None and value is not None:
                fault = check(value)
                if fault is not None:
                    self._fail(fault, self._first(argument))
        if call.name in ("explain", "diagram") and len(arguments) == 1:
            self._explain(arguments[0])
        elif call.name == "start":
            self._check_start(named["fut"])
        call.flow = self._call_flow(call, named)

    @staticmethod
    def _first(argument: Argument) -> int:
        return argument.first if argument.chain is None else argument.chain.operands[0].first

    def _check_start(self, argument: Argument) -> None:
        """What can be said of a workflow that is known as a whole."""
        self._check_steps(argument)
        flow = argument.chain.flow if argument.chain is not None else None
        if flow is None or not flow.known or argument.chain is None:
            return
        if flow.breaks is not None:
            self._fail(_BREAK_OUTSIDE, flow.breaks)
        operands = argument.chain.operands
        for name, token in sorted(flow.free.items(), key=lambda item: item[1]):
            warning = reading.undefined_name(name, self._at(token))
            self._wrap(warning, operands[0].first, operands[-1].last)

    def _check_steps(self, argument: Argument) -> None:
        """Warn of constant steps that can't be SQL. Only of a few: one slip may show in every step."""
        if argument.chain is None:
            return
        operands = argument.chain.operands
        found = 0
        for token in self._step_literals(argument.chain):
            value = self._literal(token)
            if value is None or value.value.lstrip().startswith("{") or _mentions(value.value):
                continue
            fault = steptext.fault(value.value)
            if fault is not None:
                step = reading.excerpt(value.value)
                self._wrap(reading.doubtful_step(step, fault, self._at(token)), operands[0].first, operands[-1].last)
                found += 1
                if found == MAX_DOUBTS:
                    return

    def _step_literals(self, whole: Chain) -> list[int]:
        """The literals that are steps, by their tokens, in order; not those that `||` extends."""
        found: list[int] = []
        todo = [whole]
        while todo:
            chain = todo.pop()
            if any(chain.nontext(index) for index in range(len(chain.ops))):
                continue
            symbols = [None, *(symbol for _, _, symbol in chain.ops), None]
            for operand, before, after in zip(chain.operands, symbols[:-1], symbols[1:], strict=True):
                others = any(not loop for _, loop in operand.prefixes)
                if before == "|=>" or others or not {before, after} <= _AROUND_STEPS:
                    continue
                if operand.shape == LITERAL:
                    found.append(operand.first)
                elif operand.shape == GROUP and len(operand.inner) == 1:
                    todo.append(operand.inner[0])
                elif operand.shape == CALL and operand.call is not None:
                    todo += _steps_of(operand.call)
        return sorted(found)

    def _single(self, argument: Argument) -> Operand | None:
        """The operand that the argument is, if it is one."""
        chain = argument.chain
        if chain is None or chain.ops or chain.operands[0].prefixes:
            return None
        return chain.operands[0]

    def _constant(self, operand: Operand) -> str | None:
        """The value of a string literal (with nothing but a cast to text on it)."""
        if operand.shape != LITERAL:
            return None
        value = self._literal(operand.first)
        return value.value if value is not None else None

    def _argument_constant(self, argument: Argument) -> str | None:
        """A string literal's value, or a number as written."""
        operand = self._single(argument)
        if operand is None:
            return None
        if operand.shape == NONTEXT:
            return self._sql[self._starts[operand.first] : self._ends[operand.last]]
        return self._constant(operand)

    # Names and breaks

    def _literal_flow(self, token: int, *, step: bool) -> Flow:
        """Of a string literal: a step's SQL, or a template."""
        found = self._literal(token)
        if found is None:
            return Flow(known=False)
        text = found.value
        if step and text.lstrip().startswith("{"):
            return Flow(known=False)  # a future, maybe
        flow = Flow()
        if "$" in text:
            for name in references(text):
                flow.refer(name, token)
        return flow

    def _operand_flow(self, operand: Operand, *, step: bool = True) -> Flow:
        if operand.shape == LITERAL:
            flow = self._literal_flow(operand.first, step=step)
        elif operand.shape == CALL and operand.call is not None and operand.call.flow is not None:
            flow = operand.call.flow
        elif operand.shape == GROUP and len(operand.inner) == 1 and operand.inner[0].flow is not None:
            flow = operand.inner[0].flow
        else:
            return Flow(known=False)
        for _, loop in operand.prefixes:
            flow = flow.looped() if loop else Flow(known=False)
        return flow

    def _chain_flow(self, chain: Chain) -> Flow:
        operands = chain.operands
        flow = self._operand_flow(operands[0])
        condition: Flow | None = None
        for index, (_, _, symbol) in enumerate(chain.ops):
            operand = operands[index + 1]
            if symbol == "|=>":
                name = self._constant(operand)
                flow = flow.define(name) if name is not None else Flow(known=False)
            elif symbol == "~>":
                flow = flow.then(self._operand_flow(operand))
            elif symbol in ("&", "|"):
                flow = flow.beside(self._operand_flow(operand))
            elif symbol == "?>":
                condition, flow = flow, self._operand_flow(operand)
            elif symbol == "!>" and condition is not None:
                flow = condition.then(flow.beside(self._operand_flow(operand)))
                condition = None
            else:
                return Flow(known=False)
        return flow if condition is None else Flow(known=False)

    def _argument_flow(self, argument: Argument | None) -> Flow:
        """Of an argument that takes a future; one that is not given adds nothing."""
        if argument is None:
            return Flow()
        operand = self._single(argument)
        if operand is not None and operand.shape == NAME and self._tokens.words[operand.first] == "null":
            return Flow()
        if argument.chain is None or argument.chain.flow is None:
            return Flow(known=False)
        return argument.chain.flow

    def _template_flow(self, *arguments: Argument | None) -> Flow:
        flow = Flow()
        for argument in arguments:
            operand = self._single(argument) if argument is not None else None
            if operand is not None and operand.shape == LITERAL:
                flow = flow.beside(self._literal_flow(operand.first, step=False))
        return flow

    def _call_flow(self, call: Call, named: dict[str, Argument]) -> Flow | None:
        get = named.get
        match call.name:
            case "sql":
                operand = self._single(named["query"])
                return self._operand_flow(operand, step=False) if operand is not None else Flow(known=False)
            case "seq" | "join" | "join3" | "race":
                flows = [self._argument_flow(a) for a in call.arguments]
                flow = flows[0] if flows else Flow(known=False)
                for other in flows[1:]:
                    flow = flow.then(other) if call.name == "seq" else flow.beside(other)
                return flow
            case "as" | "step":
                name = self._argument_constant(named["name"])
                return self._argument_flow(named["fut"]).define(name) if name is not None else Flow(known=False)
            case "sleep" | "wait_for_schedule" | "wait_for_signal" | "http_multipart":
                return Flow()
            case "loop":
                return self._argument_flow(named["body"]).then(self._argument_flow(get("condition"))).looped()
            case "break":
                flow = self._template_flow(get("value"))
                flow.breaks = call.at
                return flow
            case "if":
                branches = self._argument_flow(named["then_branch"]).beside(self._argument_flow(named["else_branch"]))
                return self._argument_flow(named["condition"]).then(branches)
            case "if_rows":
                branches = self._argument_flow(named["then_branch"]).beside(self._argument_flow(named["else_branch"]))
                name = self._argument_constant(named["result_name"])
                if name is None:
                    return Flow(known=False)
                return Flow().refer(name, self._first(named["result_name"])).then(branches)
            case "http":
                return self._template_flow(named["url"], get("body"), get("headers"))
            case _:
                return None

    # SQL in literals

    def dynamic(self, token: int) -> None:
        """See `scanner.Listener`."""
        fragment = self._embedded(token, plpgsql=False, claimed=self._scanner.claimed)
        if fragment is not None and fragment.speaks:
            self._scanner.speak()

    def _explain(self, argument: Argument) -> None:
        operand = self._single(argument)
        if operand is not None and operand.shape == LITERAL:
            self._embedded(operand.first, plpgsql=False, claimed=True)

    def statement(self, statement: Statement, last: int) -> None:
        """See `scanner.Listener`."""
        if statement.kind in ("routine", "do"):
            language = statement.language or ("plpgsql" if statement.kind == "do" else "sql")
            if statement.body is not None and language in _LANGUAGES:
                self._embedded(statement.body, plpgsql=_LANGUAGES[language], claimed=self._scanner.claimed)
        elif statement.kind == "create extension":
            # Line breaks inside the statement stay, at its end.
            lines = self._sql.count("\n", self._starts[statement.first], self._ends[last])
            text = reading.extension_statement(reading.dollar_tag(self._outermost)) + "\n" * lines
            self._replace(statement.first, last, text)
        elif statement.kind == "drop extension" and statement.target is not None:
            self._fail(
                ("pg_durable is provided by dfproxy and can't be dropped as an extension",
                 'Run "dfproxy uninstall" to remove its schemas from this database.', "0A000"), statement.target
            )  # fmt: skip

    def _embedded(self, token: int, *, plpgsql: bool, claimed: bool) -> _Fragment | None:
        """Compile the SQL inside a literal; what it is, where it is of interest."""
        found = self._literal(token)
        if found is None:
            return None
        start = self._starts[token]
        if (token, claimed) not in self._within:
            self._within[token, claimed] = self._fragment(token, found, plpgsql=plpgsql, claimed=claimed)
        fragment = self._within[token, claimed]
        if fragment is None:
            return None
        if fragment.skipped:
            self._scanner.skip()
        self.warnings += fragment.warnings
        for edit in fragment.sorted:
            text = found.encode(edit.text)
            if found.delimiter is not None and found.delimiter in text:
                text = text.replace("$", "")  # a message's excerpt; the code that we write has no dollar
            begin = start + found.at(edit.start)
            end = start + found.at(edit.end - 1) + _width(found, edit.end - 1) if edit.end > edit.start else begin
            self._edit(begin, end, text, start + found.at(edit.anchor), edit.rank)
        return fragment

    def _fragment(self, token: int, found: Literal, *, plpgsql: bool, claimed: bool) -> _Fragment | None:
        if self._depth >= MAX_BODY_DEPTH or not _mentions(self._tokens.text(token)) or not _mentions(found.value):
            return None
        body = lex(found.value, standard_conforming_strings=self._tokens.conforming)
        if body is None or not _relevant(body):
            return None
        start = self._starts[token]
        outer = self._position

        def position(offset: int) -> int:
            return outer(start + found.at(offset))

        fragment = _Fragment(found.value, body, [], plpgsql=plpgsql, depth=self._depth + 1,
                             position=position, outermost=self._outermost, claimed=claimed)  # fmt: skip
        fragment.sorted = sorted(fragment.edits(), key=lambda e: e.key)
        return fragment


def _width(found: Literal, offset: int) -> int:
    """Characters that one character of the value takes in the source."""
    if found.origin is None:
        return 1
    width = found.origin[offset + 1] - found.origin[offset]
    # Where a literal goes on in another part, the distance says nothing: operators are never written with escapes.
    return width if width <= 2 else 1
