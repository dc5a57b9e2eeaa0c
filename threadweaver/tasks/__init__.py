"""Where prompts and answers come from. One module a task.

load_task("multiplication", digits=3)
load_task("prompts.jsonl")
"""

from threadweaver.tasks.registry import load_task, task_names
from threadweaver.tasks.task import GradesInBackground, Problem, Split, Task

__all__ = ["GradesInBackground", "Problem", "Split", "Task", "load_task", "task_names"]
