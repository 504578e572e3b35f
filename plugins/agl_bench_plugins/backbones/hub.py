"""Files of models on the Hugging Face hub, downloaded once or found in its cache; why not, in one sentence."""

from __future__ import annotations

from pathlib import Path

from agl_bench import BadSpec, is_offline

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # what timm models are published as, the safer one first


def in_cache(repository: str) -> Path | None:
    """The weights of a repository in the cache of the hub; None where they are not there. Asks no network."""
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(repository, name) for name in WEIGHTS)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def download(place: str, names: tuple[str, ...], instead: str) -> Path:
    """The first of the files `names` that a repository has; with downloads forbidden, the first that the cache has.

    Args:
        place: OWNER/NAME, or OWNER/NAME@REVISION.
        names: of the files.
        instead: what a user without access does, after "or".

    Raises:
        BadSpec: with what the user has to do: accept terms, log in, download elsewhere.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, _, revision = place.partition("@")
    page, elsewhere = f"https://huggingface.co/{repository}", f"or {instead}"
    offline = is_offline("HF_HUB_OFFLINE")
    for name in names:
        try:
            return Path(hf_hub_download(repository, name, revision=revision or None, local_files_only=bool(offline)))
        except GatedRepoError:
            raise BadSpec(
                f"{repository} is gated: accept its terms at {page} with your account, wait until access is granted, "
                f"and set HF_TOKEN to a token of that account (huggingface.co/settings/tokens); {elsewhere}"
            ) from None
        except RevisionNotFoundError:
            raise BadSpec(f"{page} has no revision '{revision}'; take a commit or a tag that it lists") from None
        except HFValidationError:
            raise BadSpec(f"'{place}' is no name on the hub; write OWNER/NAME or OWNER/NAME@REVISION") from None
        except RepositoryNotFoundError:
            raise BadSpec(
                f"the hub has no model '{repository}' that this account may see; check the name at {page}, or set "
                "HF_TOKEN if it is private"
            ) from None
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError) and not offline:
                raise BadSpec(f"{page} cannot be reached; check the network, {elsewhere}") from None
        except Exception as error:  # noqa: BLE001  (the hub client raises what its HTTP library does)
            why = type(error).__name__
            raise BadSpec(f"{name} of {page} could not be downloaded ({why}); try again, {elsewhere}") from None
    if offline:
        raise BadSpec(f"{offline} forbids downloads, and {place} is not in the cache of the hub; unset it, {elsewhere}")
    raise BadSpec(f"{page} has no {' or '.join(names)}; choose a model that timm can load")
