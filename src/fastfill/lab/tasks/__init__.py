"""The tasks of `fastfill evaluate`, one class and one file each; from Python as from the command:

    with fastfill.attach(model, "default", min_tokens=256) as attached:  # named: what is sparse depends on no clock
        result = tasks.Perplexity(data=["held_out.txt"], limit=8).run(attached, tokenizer)

To add a task, write its class (see `base.Task`) and name it in TASKS. These modules import nothing heavy before they run,
because the command's options and its help are made from the classes.
"""

from fastfill.lab.tasks.base import Task
from fastfill.lab.tasks.longbench import LongBench
from fastfill.lab.tasks.pareto import Pareto
from fastfill.lab.tasks.peers import Peers
from fastfill.lab.tasks.perplexity import Perplexity
from fastfill.lab.tasks.picks import Picks
from fastfill.lab.tasks.recall import Recall
from fastfill.lab.tasks.ruler import Ruler
from fastfill.lab.tasks.suite import Suite

__all__ = ["TASKS", "LongBench", "Pareto", "Peers", "Perplexity", "Picks", "Recall", "Ruler", "Suite", "Task"]

CLASSES: tuple[type[Task], ...] = (Perplexity, LongBench, Ruler, Suite, Recall, Picks, Peers, Pareto)
TASKS: dict[str, type[Task]] = {task.name: task for task in CLASSES}
