"""Whether a backward pass runs, and which: autograd's graph tasks, that may be nested in one another."""

from collections.abc import Callable

import torch


def in_backward() -> bool:
    """Whether autograd is running: what is called now is called by a backward pass."""
    return torch._C._current_graph_task_id() != -1


class GraphTasks:
    """The graph tasks that were entered and have not ended, the outermost first; and those that ended in an error, of which
    torch says nothing, until `open` is cleared."""

    def __init__(self) -> None:
        self.open: list[int] = []

    def enter(self, at_the_end: Callable[[], None]) -> bool:
        """Note the running graph task, with what to call when it and all others have ended; True if it runs inside another one,
        or one before it ended in an error."""
        task = torch._C._current_graph_task_id()
        if task not in self.open:
            self.open.append(task)
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._leave(task, at_the_end))
        return self.open[0] != task

    def _leave(self, task: int, at_the_end: Callable[[], None]) -> None:
        if task not in self.open:
            return
        # Tasks inside it are over, too.
        del self.open[self.open.index(task) :]
        if not self.open:
            at_the_end()
