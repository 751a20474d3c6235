"""One of the ranks that train a run: `python -m sft_lab.worker RUN_DIR AGENT`.

It reads the run directory, where config and tokens lie, and composes, tokenises and downloads nothing.
"""

from __future__ import annotations

import logging
import os
import platform
import signal
import sys

from sft_lab import agent, console, meetings, ranks, train
from sft_lab import config as configs
from sft_lab import model as models
from sft_lab.callbacks import Stop
from sft_lab.data.prepared import Prepared
from sft_lab.errors import Interrupted, Pruned, RunError, SftLabError
from sft_lab.logs import run_log
from sft_lab.meetings import Meeting
from sft_lab.runs import RunDirectory
from sft_lab.schema import Config

log = logging.getLogger("sft_lab")


def main() -> int:
    from torch.distributed.elastic.multiprocessing.errors import record

    run, parent = RunDirectory.open(sys.argv[1]), int(sys.argv[2])
    _die_with(parent)
    try:
        code: int = record(_work)(run)
    except Exception:  # `record` has written it into a file for the agent, which tells it
        code = 1
    if code:
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)  # a clean end would wait for processes that may hang, and the agent with it
    return 0


def _die_with(parent: int) -> None:
    """A rank whose agent was killed would train on beside the one that resumes the run (Linux alone can tell it)."""
    from torch.multiprocessing import _prctl_pr_set_pdeathsig

    _prctl_pr_set_pdeathsig(signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        sys.exit(1)


def _work(run: RunDirectory) -> int:
    if run.completed or run.verdict.exists():  # or a rank knew that starting again changes nothing
        return 0
    stop = Stop()
    with stop.listening(), run_log(terminal=os.environ["RANK"] == "0") as messages:
        messages.open(run.log, rank=int(os.environ["RANK"]))
        try:
            take_part(run, stop, meetings.current())
        except Interrupted as error:
            log.info("rank %s: %s", os.environ["RANK"], error, exc_info=True)
            # Who starts ranks has written down what they were to hear; and ends them by SIGTERM for another's death.
            return 0 if run.completed or run.verdict.exists() else 1
        except Pruned as error:
            run.write_verdict(error)
            return 0
        except SftLabError as error:
            run.write_verdict(error)
            log.info("rank %s: %s", os.environ["RANK"], error, exc_info=True)
            return 1
        except Exception:
            log.info("rank %s failed", os.environ["RANK"], exc_info=True)
            raise
    return 0


def take_part(run: RunDirectory, stop: Stop, meeting: Meeting | None) -> None:
    """Train as one of the ranks; raises as `train.run` does, but for what goes wrong once the run is complete.

    Args:
        meeting: where the ranks find each other; None for one that is alone.
    """
    from sft_lab.sweep.trial import callbacks_of

    config = configs.load(run.config)
    d = config.distributed
    ranks.begin(d.num_processes, d.timeout_min, meeting.ranks(d.timeout_min) if meeting else None)
    if not ranks.leads():
        console.console.quiet = True
    elif (restart := os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) != "0":
        allowed = os.environ["TORCHELASTIC_MAX_RESTARTS"]
        log.warning("a rank has died, and all were started again (%s of %s times)", restart, allowed)
    try:
        train.run(config, run, Prepared.load(run, config.model.trust_remote_code), stop, callbacks_of(run))
        ranks.end()
    except Exception as error:
        if isinstance(error, Interrupted) or not run.completed:
            raise
        log.warning("rank %s, after the run was complete: %s", os.environ["RANK"], error, exc_info=True)


def join(meeting: Meeting, run: RunDirectory, each: int, stop: Stop) -> None:
    """Take part in a run whose processes were started from outside, as a rank or as what starts its node's ranks.

    Raises:
        SftLabError: what ended the run, on whichever rank it happened.
    """
    group = meeting.group
    try:
        config = _made_ready(meeting, run)
        if each > 1:
            agent.run(config, run, group.index, group.count, group.address, group.port + 1)
        else:
            os.environ.update(group.as_rank())
            take_part(run, stop, meeting)
    except Exception as error:
        run.raise_verdict()  # another's end has ended this one
        told = f"process {group.index} failed: {type(error).__name__}: {error}"
        run.write_verdict(error if isinstance(error, SftLabError) else RunError(told))
        raise


def _made_ready(meeting: Meeting, run: RunDirectory) -> Config:
    """The run's config, once every machine sees the run and has the model, perhaps in a cache of its own.

    Ranks then ask the hub for nothing.

    Raises:
        RunError: a machine cannot get it, or does not see the run.
    """
    from huggingface_hub import constants

    config, problem = Config(), ""
    try:
        config = configs.load(run.config)
        if meeting.group.local_index == 0:
            models.fetch(config.model)
    except Interrupted:
        raise
    except Exception as error:  # whatever it is, the others are not to wait for this one
        kind = "" if isinstance(error, SftLabError) else f"{type(error).__name__}: "
        problem = f"{platform.node()}: {kind}{error}"
    meeting.all_ready(problem, config.distributed.timeout_min)
    constants.HF_HUB_OFFLINE = True  # the variable of that name was read as the library was imported
    return config


def follow() -> int:
    """What a process does that was started beside the first one: wait for its word, then take part.

    Raises:
        RunError: the first one ended without a word.
    """
    meeting = meetings.current()
    assert meeting is not None
    stop = Stop()
    with stop.listening(), run_log(terminal=False) as messages:
        try:
            word = meeting.told()
        except Interrupted as error:
            return _code(error)
        if "leave" in word:
            return int(word["leave"])
        try:
            run = RunDirectory(word["run"])
            if run.path.is_dir():  # else the others are told of it
                messages.open(run.log, rank=meeting.group.index)
            join(meeting, run, word["each"], stop)
        except SftLabError as error:
            log.info("process %d: %s", meeting.group.index, error, exc_info=True)
            return _code(error)
        except Exception:
            log.info("process %d failed", meeting.group.index, exc_info=True)
            return 1
    return 0


def _code(error: SftLabError) -> int:
    """Slurm may end all tasks when one has failed, and the first has still to put the job into the queue again."""
    return 0 if isinstance(error, Interrupted) and error.warned else error.exit_code


if __name__ == "__main__":
    sys.exit(main())
