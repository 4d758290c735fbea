"""Whether a backward pass runs, and which: autograd's graph tasks, that may be nested in one another."""

import weakref
from collections.abc import Callable

import torch


def in_backward() -> bool:
    """Whether autograd is running: what is called now is called by a backward pass."""
    return torch._C._current_graph_task_id() != -1


class GraphTasks:
    """The graph tasks that were entered and have not ended, the outermost first."""

    def __init__(self) -> None:
        self.open: list[int] = []

    def enter(self, at_the_end: Callable[[], None]) -> bool:
        """Note the running graph task, with what to call when it and all others have ended without an error; True if it runs
        inside another one."""
        task = torch._C._current_graph_task_id()
        if task not in self.open:
            self.open.append(task)

            # Called in whatever thread ends the task, and let go of where it ends in an error.
            def leave() -> None:
                if self._leave(task):
                    at_the_end()

            weakref.finalize(leave, self._leave, task).atexit = False
            torch.autograd.Variable._execution_engine.queue_callback(leave)
        return self.open[0] != task

    def _leave(self, task: int) -> bool:
        """Whether it was open, and none is now."""
        if task not in self.open:
            return False
        # Tasks inside it are over, too.
        del self.open[self.open.index(task) :]
        return not self.open
