"""Publishes a checkpoint on the Hugging Face Hub: weights, preprocessing, model card, results, picture in one commit.

    python recipes/push.py --model runs/digits-1 --repo_id org/erde-digits
    python recipes/push.py --model runs/digits-1 --repo_id org/erde-digits --private --revision v2

The token is the one that `hf auth login` stored, or that the variable HF_TOKEN holds. The card is rendered anew from
the run's results.json, so that it names the repository.
"""

from __future__ import annotations

from dataclasses import dataclass

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx
from transformers.hf_argparser import HfArg

from erde_hub.errors import ConfigError
from erde_hub.hub import publish_checkpoint
from erde_hub.scripts.common.command_line import parse_arguments, run_script


@dataclass
class PushArguments:
    """What is published, and where."""

    model: str = HfArg(help="folder of the checkpoint")
    repo_id: str = HfArg(help="org/name; made if it is not there")
    private: bool = HfArg(default=False, help="make it private; an existing one keeps its state")
    revision: str | None = HfArg(default=None, help="branch; made if it is not there. Default: main")
    license: str = HfArg(default="apache-2.0", help="licence of the weights, as the Hub spells it")
    commit_message: str = HfArg(default="Upload early-exit model", help="first line of the commit")


def main() -> None:
    """Checks and uploads."""
    args, _ = parse_arguments({"push": PushArguments}, __doc__ or "")
    try:
        address = publish_checkpoint(
            args.model,
            args.repo_id,
            private=args.private or None,
            revision=args.revision,
            license=args.license,
            commit_message=args.commit_message,
        )
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        advice = "; log in with `hf auth login`, with a token that may write" if status in (401, 403) else ""
        raise ConfigError(f"the Hub refused ({status}){advice}: {str(error).splitlines()[0]}") from error
    except (OfflineModeIsEnabled, httpx.TransportError) as error:
        raise ConfigError(
            f"the Hub could not be reached, nothing was published: {str(error).splitlines()[0]}"
        ) from error
    print(address)


if __name__ == "__main__":
    run_script(main)
