"""The jobs of a sweep (`python -m mar.train -m ... seed=0,1,2`), one after another in one process.

A job that is finished is skipped, an interrupted one goes on, and one that is refused does not end
the sweep: so the same command goes on wherever it was stopped, and trains nothing twice. Launchers
of Hydra that run jobs in processes of their own report them themselves.
"""

import json
import math
import os
import shlex
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode

from mar.config import Config
from mar.errors import UserError, heed_ctrl_c, one_line
from mar.run.folder import swept_keys, words_of_sweep
from mar.run.interrupts import Interrupts

INTERRUPTED = "interrupted"
FAILED = "failed"
REFUSED = "refused"

# A sweep ends with the code of the first of these states that a job is in, else with 0.
EXIT_CODES = {INTERRUPTED: 130, FAILED: 1, REFUSED: 2}


class RanksApart(BaseException):
    """A job ended by an error on this rank, while others may still wait for it in that job."""


@dataclass(frozen=True)
class Job:
    """A job that has ended: its swept words, its state, its folder, and why it is not finished."""

    words: str
    state: str
    folder: str
    reason: str


@dataclass
class Sweep:
    """What has become of the jobs of a sweep."""

    ended: list[Job] = field(default_factory=list)
    num_jobs: int = 0

    def take(self, config_of: Callable[[], Config], train: Callable[[Config], str]) -> None:
        """Run one job and remember how it ended; `train` returns its state. Raises
        KeyboardInterrupt, or RanksApart, where the whole sweep is to stop."""
        heed_ctrl_c()
        words = words_of_job()
        self.num_jobs = count_jobs()
        _say(f"job {len(self.ended) + 1} of {self.num_jobs}: {words}")
        folder = ""
        reason = ""
        try:
            config = config_of()
            self._require_own_folder(config.run_dir)
            folder = config.run_dir
            state = train(config)
        except UserError as error:
            state = REFUSED
            reason = str(error)
            print(f"error: {error}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            state = INTERRUPTED
        except Exception as error:
            # A fault of the code: it is shown whole, and other jobs may be spared from it.
            state = FAILED
            reason = one_line(error)
            traceback.print_exc()
        self.ended.append(Job(words, state, folder, reason))
        # A signal in the last step of a job does not stop the job, but it does stop the sweep.
        if state == INTERRUPTED or Interrupts.any_received:
            raise KeyboardInterrupt
        # All ranks refuse a config alike; of what comes later one may know alone.
        if reason and folder and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RanksApart

    def _require_own_folder(self, folder: str) -> None:
        """Raises UserError where an earlier job has this folder: it would move aside."""
        for job in self.ended:
            if job.folder and Path(job.folder).resolve() == Path(folder).resolve():
                raise UserError(
                    f"{folder} is the folder of the job {job.words} too: leave run_dir= out, and "
                    "give no value twice"
                )

    def run_to_its_end(self, command: Callable[[], object]) -> int:
        """Run a command whose jobs may be this sweep's, and say what became of them. Returns the
        exit code."""
        interrupted = False
        try:
            command()
        except KeyboardInterrupt:
            interrupted = True
        except RanksApart:
            pass  # torchrun ends the other ranks when this one has left
        if self.ended:
            self._say_states()
        states = {job.state for job in self.ended}
        if interrupted:
            states.add(INTERRUPTED)
        return next((code for state, code in EXIT_CODES.items() if state in states), 0)

    def _say_states(self) -> None:
        """The table that a sweep ends with; in a pipe one JSON document comes after it."""
        counts = Counter(job.state for job in self.ended)
        not_begun = self.num_jobs - len(self.ended)
        if not_begun > 0:
            counts["not begun"] = not_begun
        told = ", ".join(f"{number} {state}" for state, number in counts.items())
        noun = "job" if self.num_jobs == 1 else "jobs"
        _say(f"\n{self.num_jobs} {noun}: {told}")
        wide_words = max(len(job.words) for job in self.ended)
        wide_states = max(len(job.state) for job in self.ended)
        for job in self.ended:
            line = f"  {job.words:{wide_words}}  {job.state:{wide_states}}  {job.folder}"
            _say(line.rstrip())
            if job.reason:
                _say(f"    {job.reason}")
        if counts[INTERRUPTED] or not_begun > 0:
            _say("the same command goes on: finished jobs are skipped")
        folders = [job.folder for job in self.ended if job.folder]
        if len(folders) > 1:
            above = os.path.commonpath(folders)
            _say(f"  python -m mar.report {shlex.quote(above)}   # all runs there in one HTML file")
        if not sys.stdout.isatty():
            _say(json.dumps({"jobs": [asdict(job) for job in self.ended], "not_begun": not_begun}))


def in_sweep() -> bool:
    """Whether this is a job of a sweep, whatever launches it."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def in_one_process() -> bool:
    """Whether all jobs of the sweep run in this process: Hydra's own launcher."""
    return HydraConfig.get().runtime.choices["hydra/launcher"] == "basic"


def words_of_job() -> str:
    """The words in which this job differs from others of its sweep."""
    swept = swept_keys(words_of_sweep())
    words = []
    for word in HydraConfig.get().overrides.task:
        key = word.partition("=")[0].lstrip("+~")
        if key in swept:
            words.append(word.lstrip("+"))
    return " ".join(words)


def count_jobs() -> int:
    """How many jobs the sweep has: every combination of the values of its keys."""
    words = [word for word in words_of_sweep() if "=" in word and not word.startswith("-")]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    num_values = {}
    for override in parser.parse_overrides(words):
        values = [""]
        if override.is_sweep_override():
            values = list(override.sweep_string_iterator())
        num_values[override.get_key_element()] = len(values)
    return math.prod(num_values.values())


def _say(line: str) -> None:
    """Of several ranks one speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)
