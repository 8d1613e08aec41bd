"""`compress push`: what goes to the hub, and what is said when nothing can. The hub is a stand-in."""

import fnmatch
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from cli_runner import invoke, succeeds

WRITTEN = ("packed", "thin")


class Url(str):
    repo_id = "me/model"


class Hub:
    """What was asked of it, in order. fails: what a call raises, by its name."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.fails: dict[str, Exception] = {}
        self.private = True

    def __call__(self, **about: Any) -> "Hub":
        assert about["library_name"] == "compress"
        return self

    def _called(self, name: str, **options: Any) -> None:
        self.calls.append((name, options))
        if name in self.fails:
            raise self.fails[name]

    def create_repo(self, repository: str, **options: Any) -> Url:
        self._called("create_repo", repository=repository, **options)
        return Url(f"https://hub/{repository}")

    def model_info(self, repository: str) -> Any:
        self._called("model_info", repository=repository)
        return type("Info", (), {"private": self.private})()

    def upload_folder(self, **options: Any) -> None:
        self._called("upload_folder", **options)


@pytest.fixture
def hub(monkeypatch):
    stand_in = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", stand_in)
    return stand_in


def uploaded(hub: Hub, folder: Path) -> set[str]:
    """As the hub's own client chooses files by its patterns."""
    options = dict(hub.calls)["upload_folder"]
    assert options["folder_path"] == folder
    files = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
    return {file for file in files if any(fnmatch.fnmatch(file, pattern) for pattern in options["allow_patterns"])}


@pytest.mark.parametrize("kind", ["packed", "thin"])
def test_all_of_a_checkpoint_goes_up_and_nothing_else(kind, root, hub, tmp_path):
    out = Path(shutil.copytree(root / kind, tmp_path / kind))
    (out / "quality.json").write_text("{}")
    (out / "plots").mkdir()
    (out / "plots" / "errors.png").write_bytes(b"png")
    own = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    for foreign in (".env", "notes.txt", "id_rsa", "train.py", *(["adapter/secret"] if kind == "packed" else [])):
        (out / foreign).write_text("secret")
    ran = succeeds("push", out, "me/model", "--json")
    assert ran.json["address"] == "https://hub/me/model"
    assert [name for name, _ in hub.calls] == ["create_repo", "upload_folder"]
    assert hub.calls[0][1] == {"repository": "me/model", "private": True, "exist_ok": False}
    assert uploaded(hub, out) == own
    assert hub.calls[1][1]["delete_patterns"] is None


def test_public_and_overwrite_are_only_what_is_said_to_be(root, hub):
    succeeds("push", root / "thin", "me/model", "--public", "--overwrite")
    assert hub.calls[0][1] == {"repository": "me/model", "private": False, "exist_ok": True}
    assert hub.calls[-1][1]["delete_patterns"] == ["*"]


def test_nothing_private_goes_to_where_everybody_looks(root, hub):
    hub.private = False
    ran = invoke("push", root / "thin", "me/model", "--overwrite")
    assert ran.code == 2
    assert "everybody can see it" in ran.faults[0]
    assert "upload_folder" not in dict(hub.calls)


def link(file: Path, elsewhere: Path) -> None:
    elsewhere.write_bytes(file.read_bytes() if file.exists() else b"secret")
    file.unlink(missing_ok=True)
    file.symlink_to(elsewhere)


DAMAGES: dict[str, Callable[[Path, Path], Any]] = {
    "missing": lambda out, part: part.unlink(),
    "unfinished": lambda out, part: out.rename(out.with_name("thin.partial")),
    "link": lambda out, part: link(out / "LICENSE", out.with_name("secret")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_nothing_is_pushed_that_does_not_verify(damage, root, hub, tmp_path):
    out = Path(shutil.copytree(root / "thin", tmp_path / "thin"))
    DAMAGES[damage](out, min(out.glob("*.safetensors")))
    ran = invoke("push", out, "me/model")
    assert ran.code in (1, 2)
    assert ran.faults
    assert hub.calls == []


def refused(status: int) -> HfHubHTTPError:
    request = httpx2.Request("POST", "https://hub/api")
    return HfHubHTTPError(f"{status}\nfor url", response=httpx2.Response(status, request=request))


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (refused(401), 4, "The hub does not know you: run `hf auth login`"),
        (refused(403), 4, "Your token may not write 'me/model'"),
        (refused(409), 2, "The hub has 'me/model' already. Name another repository, or replace it: --overwrite."),
        (refused(500), 4, "'me/model' could not be pushed (500 for url)"),
        (httpx2.ConnectError("Name or service not known"), 4, "could not be pushed (Name or service not known)"),
        (TimeoutError("slow"), 4, "could not be pushed (slow)"),
        (HFValidationError("bad"), 2, "names are NAME or OWNER/NAME"),
        (LocalTokenNotFoundError("none"), 4, "run `hf auth login`, or set HF_TOKEN"),
        (OfflineModeIsEnabled("off"), 4, "HF_HUB_OFFLINE is set"),
    ],
)
def test_the_hubs_refusal_is_one_line(error, code, said, root, hub):
    hub.fails["create_repo" if code == 2 else "upload_folder"] = error
    ran = invoke("push", root / "thin", "me/model")
    assert ran.code == code
    assert len(ran.faults) == 1
    assert said in ran.faults[0]
