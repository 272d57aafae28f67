"""What an answer is held to, compiled: the format that was asked for, or the calls that tools allow."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from armillary.core.errors import InputError
from armillary.serve.grammar.compiler import Compiled
from armillary.serve.grammar.grammar import Grammar
from armillary.serve.http.off_loop import off_loop
from armillary.serve.tools.constraint import constraint
from armillary.serve.tools.definitions import Toolbox

if TYPE_CHECKING:
    from armillary.serve.service import Service


def told(toolbox: Toolbox | None) -> int:
    """About how many characters a prompt tells of its tools."""
    return sum(len(tool.description) + len(str(tool.parameters)) for tool in toolbox.tools) if toolbox is not None else 0


async def held_to(service: Service, wanted: Callable[[], Grammar | None] | None, toolbox: Toolbox | None = None) -> Compiled | None:
    """`wanted` gives the grammar of the format that was asked for. Raises InputError for one beside tools, or what cannot be followed."""
    grammar = await asyncio.to_thread(wanted) if wanted is not None else None
    if toolbox is not None:
        if grammar is not None:
            raise InputError(
                f"{grammar.field} says what the answer must look like, and so do tools", "send one of them", field=grammar.field
            )
        grammar = await off_loop(told(toolbox), lambda: constraint(toolbox, service.call_format))
    return await service.grammars.compiled(grammar) if grammar is not None else None
