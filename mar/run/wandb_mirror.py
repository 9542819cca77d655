"""The same numbers in wandb (logger.wandb=offline|online).

A mirror only: whatever goes wrong with it is said once, and the run goes on without it.
"""

import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mar.errors import one_line

PATIENCE_S = 60.0  # the longest that one call may keep the run waiting
TEXT_COLUMNS = ("step", "id", "text", "answers", "confidences", "hits", "reward", "reason")


class Mirror:
    """A wandb run. Its id is kept in the run's folder, so that a resumed run goes on in it."""

    def __init__(
        self, mode: str, folder: Path, config: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        self.wandb: Any = None  # the module
        self.run: Any = None
        self.table: Any = None
        self.on = mode != "off"
        self.folder = folder
        self.say = say
        self._guard(lambda: self._open(mode, config))

    def _guard(self, call: Callable[[], None]) -> None:
        """Call it in a thread that may hang or fail without the run. After that nothing more is
        tried."""
        if not self.on:
            return
        faults: list[BaseException] = []

        def work() -> None:
            try:
                call()
            except BaseException as error:  # another package's service: anything may come
                faults.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(PATIENCE_S)
        if faults:
            self._switch_off(one_line(faults[0]))
        elif thread.is_alive():
            self._switch_off(f"no answer in {PATIENCE_S:.0f} s")

    def _switch_off(self, why: str) -> None:
        self.say(f"wandb is off from here on ({why}); the run's own files are complete")
        self.on = False

    def _open(self, mode: Any, config: Mapping[str, Any]) -> None:
        import wandb

        if mode == "online" and not wandb.login(prompt=False):  # it would ask at the keyboard
            raise RuntimeError("no API key: run `wandb login`, or take logger.wandb=offline")
        id_file = self.folder / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        self.run = wandb.init(
            project="mar",
            id=id_file.read_text(),
            dir=self.folder,
            name=self.folder.name,
            resume="allow",
            mode=mode,
            config=dict(config),
            settings=wandb.Settings(
                init_timeout=PATIENCE_S,
                silent=True,
                console="off",
                disable_git=True,
                x_disable_stats=True,
            ),
        )
        # Steps of our own: after a rewind wandb would drop what is logged for steps it has seen.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        self.wandb = wandb

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """The metrics of a finished step; what is undefined is left out."""
        known = {key: value for key, value in metrics.items() if value is not None}
        self._guard(lambda: self.run.log({"step": step, **known}))

    def completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add to the table of completions, which grows with the run."""

        def cell(value: Any) -> Any:
            return str(value) if isinstance(value, list | tuple) else value

        def add() -> None:
            if self.table is None:
                self.table = self.wandb.Table(columns=list(TEXT_COLUMNS), log_mode="INCREMENTAL")
            for row in rows:
                self.table.add_data(*(cell(row[name]) for name in TEXT_COLUMNS))
            self.run.log({"step": step, "completions": self.table})

        self._guard(add)

    def close(self, summary: Mapping[str, Any], pictures: Callable[[], Mapping[str, Path]]) -> None:
        """The closing numbers, and the figures as images (drawn only where somebody looks)."""

        def end() -> None:
            images = {}
            for name, file in pictures().items():
                images[f"plots/{name}"] = self.wandb.Image(str(file))
            self.run.log(images)
            self.run.summary.update(dict(summary))
            self.run.finish()

        self._guard(end)
