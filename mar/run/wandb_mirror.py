"""The same numbers in wandb (logger.wandb=offline|online). A mirror: whatever goes wrong with it is said once and the run goes on without it."""

import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PATIENCE = 60.0  # seconds that any one call may keep the run waiting

TEXT_COLUMNS = ("step", "id", "text", "answers", "confidences", "hits", "reward", "reason")


class Mirror:
    """A wandb run whose id is kept in the run's folder, so that a resumed run goes on in it."""

    def __init__(
        self, mode: str, folder: Path, config: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        self.run: Any = None
        self.table: Any = None
        self.wandb: Any = None
        self.on, self.folder, self.say = mode != "off", folder, say
        self._guard(lambda: self._open(mode, config))

    def _guard(self, call: Callable[[], None]) -> None:
        """Do it in a thread that may hang or fail without the run; nothing more is done after that."""
        if not self.on:
            return
        fault: list[BaseException] = []

        def work() -> None:
            try:
                call()
            except BaseException as error:  # the service of another package: anything may come
                fault.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        if fault or thread.is_alive():
            why = (
                f"{type(fault[0]).__name__}: {' '.join(str(fault[0]).split())[:160]}"
                if fault
                else f"no answer in {PATIENCE:.0f} s"
            )
            self.say(f"wandb is off from here on ({why}); the run's own files are complete")
            self.on = False

    def _open(self, mode: Any, config: Mapping[str, Any]) -> None:
        import wandb

        if mode == "online" and not wandb.login(prompt=False):  # it would ask at the keyboard
            raise RuntimeError("no API key: run `wandb login`, or take logger.wandb=offline")
        folder, file = self.folder, self.folder / "wandb_id"
        if not file.exists():
            file.write_text(secrets.token_hex(4))
        settings = wandb.Settings(
            init_timeout=PATIENCE,
            silent=True,
            console="off",
            disable_git=True,
            x_disable_stats=True,
        )
        place: dict[str, Any] = {
            "project": "mar",
            "id": file.read_text(),
            "dir": folder,
            "name": folder.name,
        }
        self.run = wandb.init(
            **place, resume="allow", mode=mode, config=dict(config), settings=settings
        )
        self.wandb = wandb

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        known = {key: value for key, value in metrics.items() if value is not None}
        self._guard(lambda: self.run.log(known, step=step))

    def completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add to the table of completions that grows with the run."""

        def add() -> None:
            if self.table is None:
                self.table = self.wandb.Table(columns=list(TEXT_COLUMNS), log_mode="INCREMENTAL")
            for row in rows:
                self.table.add_data(
                    *(str(v) if isinstance(v := row[c], list | tuple) else v for c in TEXT_COLUMNS)
                )
            self.run.log({"completions": self.table}, step=step)

        self._guard(add)

    def close(self, summary: Mapping[str, Any], pictures: Callable[[], Mapping[str, Path]]) -> None:
        """The closing numbers, and figures (drawn only where somebody looks at them) as images."""

        def end() -> None:
            self.run.log(
                {f"plots/{name}": self.wandb.Image(str(file)) for name, file in pictures().items()}
            )
            self.run.summary.update(dict(summary))
            self.run.finish()

        self._guard(end)
