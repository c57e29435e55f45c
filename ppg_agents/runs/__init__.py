"""The run folder: a run's output, in files that survive a crash."""

from ppg_agents.runs.run import Run, RunError, default_folder, finite, is_run, lock, newest_run, read_jsonl

__all__ = ["Run", "RunError", "default_folder", "finite", "is_run", "lock", "newest_run", "read_jsonl"]
