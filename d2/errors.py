"""What a user can cause, one class per exit code: each message says what, where, expected, got, next step."""

MAX_MESSAGE = 2000  # characters; a message may quote a value from a file, however long


class D2Error(Exception):
    """Root of every failure d2 announces in one line; `exit_code` is what the process ends with."""

    exit_code = 1

    def __init__(self, message: str):
        super().__init__(" ".join(message.split())[:MAX_MESSAGE])


class UsageError(D2Error):
    """The command line itself is wrong."""

    exit_code = 2


class InputError(D2Error):
    """A file, a folder or a configuration value cannot be used."""

    exit_code = 3


class SetupError(D2Error):
    """The machine lacks something: weights, a GPU, an optional dependency, a system library."""

    exit_code = 4


class ResourceError(D2Error):
    """Disk or memory ran out, or would."""

    exit_code = 5


class NumericalError(D2Error):
    """A computation left the finite numbers; the last good state is kept."""

    exit_code = 6


class WorkerError(D2Error):
    """A worker process or rank died or stopped answering."""

    exit_code = 7


class ConflictError(D2Error):
    """Something is in the way: a lock, an existing output, an incompatible or unfinished run."""

    exit_code = 8


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host's or a GPU's memory ran out; torch has a type of its own for the one, words for the other."""
    words = "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or words


class Stopped(D2Error):
    """A signal asked the work to stop; the state is saved. `exit_code` is 128 + signal number."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum
