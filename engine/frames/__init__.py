"""A frame for each type of node: what the interpreter walks with."""

from __future__ import annotations

from dsl.graph import NodeType
from engine.frames.base import Frame
from engine.frames.compounds import IfFrame, JoinFrame, RaceFrame, ThenFrame
from engine.frames.leaves import BreakFrame, ScheduleFrame, SignalFrame, SleepFrame, StepFrame
from engine.frames.loop import LoopFrame

FRAMES: dict[NodeType, type[Frame]] = {
    NodeType.THEN: ThenFrame, NodeType.IF: IfFrame, NodeType.JOIN: JoinFrame, NodeType.RACE: RaceFrame,
    NodeType.LOOP: LoopFrame, NodeType.BREAK: BreakFrame, NodeType.SLEEP: SleepFrame,
    NodeType.WAIT_SCHEDULE: ScheduleFrame, NodeType.SIGNAL: SignalFrame, NodeType.SQL: StepFrame,
    NodeType.HTTP: StepFrame, NodeType.HTTP_MULTIPART: StepFrame,
}
