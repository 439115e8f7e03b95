"""Whether operators are meant as ours: `~>`, `|=>`, `?>`, `!>` and prefix `@>` may as well be somebody else's.

Types would tell, and only the server knows them. What a text shows without them:

* a statement speaks of workflows if it calls a df function that makes or takes futures, or if an operand says so: a
  literal that reads as a step (`x ~> 'SELECT ...'`), a call that is given one (`format('SELECT ...', x) ~> y`),
  literals on both sides. PL/pgSQL's unit is the body, since its variables carry futures from statement to statement
* in a statement that does, all operators are ours; in any other one none is. So expressions of columns and parameters
  alone are left to those who have operators of their own
"""

from __future__ import annotations

import re
from enum import IntEnum

from dsl.dialect import Tokens, names
from dsl.surface import BUILDERS, FUNCTIONS


class Evidence(IntEnum):
    """What an operand says about the operator beside it, the strongest last."""

    NOTHING = 0
    TEXT = 1  #: a literal that may be anything
    STEP = 2  #: text that reads as SQL
    FUTURE = 3  #: what a builder or one of our operators returns

    def with_operator(self, right: Evidence) -> bool:
        """Whether a distinctive operator between the two is ours."""
        return max(self, right) >= Evidence.STEP or (self is right is Evidence.TEXT)

    def beside(self, right: Evidence) -> Evidence:
        """What `&` or `|` between the two makes."""
        return max(self, right) if max(self, right) is Evidence.FUTURE else min(self, right, Evidence.STEP)

    def continued(self, right: Evidence) -> Evidence:
        """What `||` makes of the two: the beginning says what it is."""
        return self if self >= Evidence.STEP else min(self, right)


NOTHING = Evidence.NOTHING

_NAME = r'["\w.$]+'
#: How a literal begins that can hardly be anything but a step. Words of other texts ("set", "call me") don't do.
_STEP = re.compile(
    rf"""(?:[eEnN]|[uU]&)?(?:'|\$\w*\$)(?>(?:\s++|\\[nrt]|--[^\n\r]*+[\n\r]|\()*)(?:
    select(?:\s|["(*]|'')
    | insert\s+into\b | delete\s+from\b | merge\s+into\b | values\s*\(
    | update\s+(?:only\s+)?{_NAME}\s+(?:\*\s+)?(?:(?:as\s+)?{_NAME}\s+)?set\b | update\s+'\Z
    | with\s+(?:recursive\s+)?{_NAME}\s*(?:\([^)]*\)\s*)?as\s+(?:not\s+)?(?:materialized\s+)?\(
    | call\s+{_NAME}\s*\( | do\s+(?:language\s+\w+\s+)?[$'] | refresh\s+materialized\s+view\b | truncate\s+{_NAME}
    | vacuum\b | analyze\b | reindex\b
    | (?:create|alter|drop)\s+(?:or\s+replace\s+|unique\s+|temp\s+|temporary\s+|unlogged\s+|materialized\s+)*
      (?:table|index|view|schema|sequence|function|procedure|trigger|type|role|policy|extension|statistics)\b
    | \{{[^}}]*"node_type"
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_LONGEST_HEAD = 400


def reads_as_step(tokens: Tokens, index: int) -> bool:
    """Whether the literal, by its beginning, is the SQL of a step or the text of a future."""
    start = tokens.starts[index]
    return _STEP.match(tokens.sql[start : min(tokens.ends[index], start + _LONGEST_HEAD)]) is not None


#: Functions of df that neither make nor take futures: a statement may ask for a status and have operators of its own.
NEUTRAL = frozenset(FUNCTIONS) - BUILDERS - names("start explain diagram if_then_op")
