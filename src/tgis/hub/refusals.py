"""What goes wrong between the hub and the disk, each as one line that says what to do."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, errors
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

from tgis.errors import ModelError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_AGAIN = "what has come is kept, run the command again to go on"

# The first that fits counts.
_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set; unset it to download"),
    (
        errors.GatedRepoError,
        "it is gated; accept its terms at {hub}/{model} and give a token of that account with"
        " HF_TOKEN or --token",
    ),
    (
        errors.RepositoryNotFoundError,
        "not found on {hub}, or private; check the name, or give a token that may read it with"
        " HF_TOKEN or --token",
    ),
    (
        errors.RevisionNotFoundError,
        "it has no revision {revision}; --revision must be a branch, a tag or a commit",
    ),
    (
        errors.RemoteEntryNotFoundError,
        "{hub} lists the file {file} at revision {revision}, but does not have it",
    ),
    (errors.LocalEntryNotFoundError, "{hub} cannot be reached for the file {file}; " + _AGAIN),
    (errors.DisabledRepoError, "{hub} has disabled access to it"),
    (
        errors.HFValidationError,
        "that is no name of a model on the hub; expected NAME or ORGANISATION/NAME",
    ),
)
_KINDS: tuple[type[Exception], ...] = (errors.HfHubHTTPError, *(kind for kind, _ in _REASONS))
_STATUS = {
    401: "{hub} refuses the token; give a valid one with HF_TOKEN or --token",
    403: "{hub} denies access; the token (HF_TOKEN or --token) must be allowed to read it",
    404: "not found on {hub} (status 404); check the name and HF_ENDPOINT",
    429: "{hub} asks to slow down (status 429); " + _AGAIN + " later",
}


@contextmanager
def explained(
    model: str, revision: str, directory: Path | None = None, file: str = ""
) -> Iterator[None]:
    """Turn what libraries and the system raise into errors of one line.

    Args:
        model: its name.
        revision: what was asked for.
        directory: where files are written.
        file: the one that it is about.

    Raises:
        ModelError: instead of errors of the network, of the hub and of the disk.
    """
    try:
        yield
    except _KINDS as error:
        text = _reason(error).format(
            hub=constants.ENDPOINT, model=model, revision=revision, file=file
        )
        raise ModelError(f"Model {model}: {text}") from None
    except HTTPError as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        cause = re.sub(r"\?\S+", "", cause)  # signed addresses
        raise ModelError(
            f"Model {model}: cannot reach {constants.ENDPOINT}: {cause}; check the network, proxy"
            f" and HF_ENDPOINT; {_AGAIN}"
        ) from None
    except OSError as error:
        raise disk_error(error, directory or Path(error.filename or ".")) from None


def disk_error(error: OSError, directory: Path) -> ModelError:
    """For an error of writing below a directory."""
    if error.errno in _NO_ROOM:
        return full_disk(directory, str(error.strerror))
    return ModelError(f"cannot write to {error.filename or directory}: {error.strerror or error}")


def full_disk(directory: Path, what: str) -> ModelError:
    """For a disk without room."""
    return ModelError(
        f"no room in {directory}: {what}; free some, or set HF_HUB_CACHE to another disk; {_AGAIN}"
    )


def _reason(error: Exception) -> str:
    for kind, text in _REASONS:
        if isinstance(error, kind):
            return text
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    return _STATUS.get(status, f"{{hub}} answers with status {status}; {_AGAIN}")
