"""What a constant workflow defines and refers to: result names, references, breaks (for compile-time findings).

Built bottom-up along with the calls; each flow is consumed by the one that contains it, smaller sets being merged
into larger ones, so that a chain of thousands of steps stays cheap.
"""

from __future__ import annotations


class Flow:
    """Names that a part of a workflow needs from before it (with where they stand), and names that it defines."""

    __slots__ = ("breaks", "defined", "free", "known")

    def __init__(self, *, known: bool = True) -> None:
        self.known = known  # False: some part is not constant, so nothing can be concluded
        self.free: dict[str, int] = {}
        self.defined: set[str] = set()
        self.breaks: int | None = None  # where a break stands that no loop of this part encloses

    def refer(self, name: str, position: int) -> Flow:
        """It refers to a result."""
        self.free.setdefault(name, position)
        return self

    def define(self, name: str) -> Flow:
        """Its own result gets a name."""
        self.defined.add(name)
        return self

    def then(self, later: Flow) -> Flow:
        """`self`, then `later`, which sees the names of `self`."""
        if len(self.defined) < len(later.free):
            for name in self.defined:
                later.free.pop(name, None)
        else:
            later.free = {n: p for n, p in later.free.items() if n not in self.defined}
        return self.beside(later)

    def beside(self, other: Flow) -> Flow:
        """`self` and `other`, neither of which sees the other's names."""
        big, small = (self, other) if len(self.free) >= len(other.free) else (other, self)
        for name, position in small.free.items():
            big.free[name] = min(position, big.free.get(name, position))
        self.free = big.free
        large, little = (self.defined, other.defined) if len(self.defined) >= len(other.defined) else (
            other.defined, self.defined)
        large |= little
        self.defined = large
        self.known = self.known and other.known
        if self.breaks is None:
            self.breaks = other.breaks
        return self

    def looped(self) -> Flow:
        """In a loop: a name from an earlier round may be what a reference means, and breaks end here."""
        self.free = {n: p for n, p in self.free.items() if n not in self.defined}
        self.breaks = None
        return self
