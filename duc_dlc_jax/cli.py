"""What the commands share: parsing, errors in one line, the compilation cache."""

from __future__ import annotations

import contextlib
import errno
import logging as py_logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax
from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from duc_dlc_jax import config as config_lib
from duc_dlc_jax import distributed, protocols, storage
from duc_dlc_jax.data.labels import DataError
from duc_dlc_jax.errors import (
    CheckpointError,
    MissingProcesses,
    NotEqual,
    NotFinite,
    Stopped,
)

flags.disclaim_key_flags()  # --help shows those that are defined here as the command's

# Where a restart helps: STOPPED, 1 (another error) and signals. See docs/clusters.md.
STOPPED = 75
DISK_FULL = 4
UNKNOWN = 1
INTERRUPTED = 128 + signal.SIGINT  # as shells say it
_FULL = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
EXIT_CODES = {
    config_lib.ConfigError: 2,
    DataError: 2,
    FileNotFoundError: 2,
    FileExistsError: 2,
    IsADirectoryError: 2,
    NotADirectoryError: 2,
    PermissionError: 2,
    NotFinite: 3,
    CheckpointError: DISK_FULL,
    MissingProcesses: 5,
    NotEqual: 6,
    Stopped: STOPPED,
}


def run(main: Callable) -> None:
    """absl's `app.run`; an error that a user can mend is one line on stderr and an exit code."""

    def guarded(argv):
        try:
            return main(argv)
        except Stopped as error:
            fail(error, STOPPED)
        except (Exception, KeyboardInterrupt) as error:
            code, message = _end_of(error)
            if distributed.several():
                if code == UNKNOWN:
                    with contextlib.suppress(OSError):
                        traceback.print_exc()
                    message = " ".join([message, *_lost()])
                code, message = distributed.end_all(code, message)
                _leave(message, code)
            if code == UNKNOWN:
                raise
            if code == DISK_FULL:
                _leave(message, code)
            fail(message, code)

    logging.set_verbosity(logging.INFO)
    logging.use_python_logging(quiet=True)
    logging.get_absl_handler().addFilter(_ours_or_serious)
    py_logging.getLogger("jax").setLevel(py_logging.WARNING)
    app.run(guarded, flags_parser=_parse)


def _end_of(error: BaseException) -> tuple[int, str]:
    """The exit code of an error, and its message."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    for kind, code in EXIT_CODES.items():
        if isinstance(error, kind):
            return code, str(error)
    if any(text in str(error) for text in _FULL):  # Python's, TensorFlow's and TensorStore's
        return DISK_FULL, f"{error}; make room, and the same command goes on"
    return UNKNOWN, f"{type(error).__name__}: {error}"


def _lost() -> list[str]:
    """Which processes are gone: the reason, perhaps, for an error of this one."""
    return [f"Process {index} of the run is silent." for index in distributed.silent()]


def _leave(message: str, code: int) -> NoReturn:
    """As `fail`, at once.

    Of a save that failed, Orbax's threads wait for each other for minutes, and Python for them;
    and JAX would wait for the other processes of the run.
    """
    _say(f"error: {message}")
    os._exit(code)


def _ours_or_serious(record: py_logging.LogRecord) -> bool:
    """Log filter: libraries speak from warnings on."""
    return record.levelno >= py_logging.WARNING or "duc_dlc_jax" in record.pathname


def parsed_size(flag: str, text: str) -> tuple[int, int]:
    """(height, width) of "1024x2048". Raises ConfigError, naming the flag, for what is none."""
    height, x, width = text.partition("x")
    if not (x and height.isdigit() and width.isdigit()):
        raise config_lib.ConfigError(f"--{flag}={text}; it is HEIGHTxWIDTH, 1024x2048")
    return int(height), int(width)


def fail(error: Exception | str, code: int = 2) -> NoReturn:
    _say(str(error) if code == STOPPED else f"error: {error}")
    sys.exit(code)


def _say(text: str) -> None:
    """Prints to stderr; the disk that is full may be the log's, too, and the exit code remains."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()


def _parse(argv: list[str]) -> list[str]:
    """Parses flags; `--config` falls back to the packaged file, wrong field names end here."""
    argv = list(argv)
    try:
        for i, word in enumerate(argv):
            name, equals, value = word.lstrip("-").partition("=")
            if name == "config" and word.startswith("-"):
                if equals:
                    argv[i] = f"--config={_found(value)}"
                elif i + 1 < len(argv):
                    argv[i + 1] = _found(argv[i + 1])
            else:
                _check_field(word)
        with contextlib.suppress(SystemExit):  # --help has been printed: absl ends with 1
            return flags.FLAGS(argv)
        sys.exit(0)
    except flags.Error as error:
        fail(error)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        fail(config_lib.ConfigError(str(error).strip('"')))


def _found(path: str) -> str:
    """As `config_lib.find`; a broken file is a ConfigError too, of which the flag says less."""
    config_lib.read(path)
    return config_lib.find(path)


def _check_field(word: str) -> None:
    """Raises ConfigError where a word of the command line sets a field that does not exist."""
    name = word.lstrip("-").partition("=")[0]
    if word.startswith("-") and name.startswith("config."):
        config_lib.check_field_name(name.removeprefix("config."))


def define_fields(help_text: str) -> None:
    """Defines `--config.a.b=VALUE` for a command that reads no configuration file.

    ml_collections parses the fields as soon as they are defined: wrong names end here.
    """
    try:
        for word in sys.argv[1:]:
            _check_field(word)
    except config_lib.ConfigError as error:
        fail(error)
    config_flags.DEFINE_config_dict("config", config_lib.default(), help_text)


def define_names(
    name: str, allowed: Sequence[str], help_text: str, default: Sequence[str] = ()
) -> None:
    """Defines a flag that takes one or several of the allowed names, separated by commas.

    With a default it takes no empty list.
    """

    def check(names: list[str]) -> bool:
        if default and not names:
            raise flags.ValidationError(f"no name; allowed: {', '.join(allowed)}")
        if flags.FLAGS[name].present > 1:  # absl would take the last one
            raise flags.ValidationError("given more than once; separate the names by commas")
        for i, word in enumerate(names):
            if word not in allowed or word in names[:i]:
                twice = " twice" if word in allowed else ""
                raise flags.ValidationError(f"{word!r}{twice}; allowed: {', '.join(allowed)}")
        return True

    flags.DEFINE_list(name, list(default), f"{help_text} One or several of {', '.join(allowed)}.")
    flags.register_validator(name, check)


def define_protocol(several: bool = False) -> None:
    """The flags --protocol (of `several`: a list) and --set, for `protocols.select`."""
    default = "Default: the configuration's config.eval."
    if several:
        define_names("protocol", tuple(protocols.PRESETS), default)
    else:
        flags.DEFINE_enum("protocol", "", ["", *protocols.PRESETS], default)
    flags.DEFINE_multi_string("set", [], "FIELD=VALUE of config.eval, after the protocol.")


def use_compilation_cache(workdir: epath.Path) -> None:
    """Keeps compiled programs in `workdir/compiled`, or where JAX_COMPILATION_CACHE_DIR says.

    Small ones too, unless JAX's environment variable says otherwise: a second start compiles none.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = storage.absolute(workdir) / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        if storage.is_remote(workdir):  # XLA's own caches, of GPU kernels, need a disk
            jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def use_deterministic_kernels(deterministic: bool) -> None:
    """Of `train.deterministic`: XLA takes no GPU kernel whose result varies, and tunes none.

    Before JAX is used; on other devices it changes nothing.
    """
    if deterministic:
        given = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{given} --xla_gpu_deterministic_ops=true".strip()
