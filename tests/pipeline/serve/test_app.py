"""Every request that is right, and one clear refusal for every one that is not."""

import base64
import gzip
import json
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
from starlette.testclient import TestClient

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.pipeline.serve.app import create_app
from nnmosaic.pipeline.serve.cases import Workspace
from nnmosaic.pipeline.serve.geometry import Grid, changed_box
from nnmosaic.pipeline.serve.security import MAX_BODY, new_token
from nnmosaic.pipeline.serve.workbench import pack

TOKEN = "the-right-token"
CASE = "abdomen_02"


def client_of(session: Any, workspace: Workspace) -> TestClient:
    return TestClient(
        create_app(session, workspace, TOKEN),
        base_url="http://127.0.0.1:8000",
        headers={"Authorization": f"Bearer {TOKEN}"},
        raise_server_exceptions=False,
    )


@pytest.fixture
def client(session: Any, workspace_of_two: Workspace) -> TestClient:
    return client_of(session, workspace_of_two)


def wait_for_opening(client: TestClient) -> dict[str, Any]:
    end = time.monotonic() + 20
    while (state := client.get("/api/state").json())["opening"]:
        assert time.monotonic() < end
        time.sleep(0.01)
    return dict(state)


def open_case(client: TestClient, name: str = CASE) -> dict[str, Any]:
    answer = client.post("/api/open", json={"case": name})
    assert answer.status_code == 202, answer.text
    return wait_for_opening(client)


def world(session: Any, index: tuple[float, float, float]) -> list[float]:
    left, back, up = session.image.TransformContinuousIndexToPhysicalPoint(index[::-1])
    return [-left, -back, up]


def point(session: Any, index: tuple[float, float, float] = (10, 90, 75), **changed: Any) -> Any:
    message = {"case": CASE, "label": "spleen", "positive": True, "world": world(session, index)}
    return {**message, **changed}


def refused(answer: Any, status: int, reason: str) -> str:
    """Return the one sentence of a refusal."""
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error", "reason"}
    assert answer.json()["reason"] == reason
    return str(answer.json()["error"])


def test_open_click_scribble_undo_reset_save(
    client: TestClient, session: Any, workspace_of_two: Workspace
) -> None:
    assert client.get("/api/cases").json() == {
        "cases": [{"name": "abdomen_01", "saved": False}, {"name": CASE, "saved": False}],
        "faults": {},
    }
    case = open_case(client)["case"]
    assert (case["name"], case["ready"], case["channels"]) == (CASE, True, ["CT"])
    assert session.opened == [workspace_of_two.images / f"{CASE}_0000.nii.gz"]
    shape = tuple(case["shape"])
    assert shape == session.array.shape[::-1]

    # The page's copy: the whole map, then only what changes.
    page = np.zeros(shape, np.uint8)

    def apply(update: dict[str, Any]) -> None:
        assert update["box"] is not None
        part = tuple(slice(*limits) for limits in update["box"])
        raw = zlib.decompress(base64.b64decode(update["voxels"]))
        page[part] = np.frombuffer(raw, np.uint8).reshape(page[part].shape, order="F")
        # to_world of the page's voxels is where the label map has the same value
        to_world = np.array(case["to_world"])
        for at in np.argwhere(page)[::997]:
            right, front, up = (to_world @ [*at, 1])[:3]
            index = session.image.TransformPhysicalPointToIndex((-right, -front, up))
            assert session.result[index[::-1]] == page[tuple(at)]
        assert np.bincount(page.ravel()).tolist() == np.bincount(session.result.ravel()).tolist()

    apply(client.get("/api/label_map").json())
    update = client.post("/api/point", json=point(session)).json()
    apply(update)
    assert update["revision"] == 1
    assert update["unsaved"] is True
    assert np.prod([b - a for a, b in update["box"]]) < page.size / 2
    np.testing.assert_allclose(session.calls[0][1], (10, 90, 75), atol=1e-6)
    assert update["marks"][0]["label"] == "spleen"

    points = [world(session, (9, 40 + i, 60)) for i in range(5)]
    stroke = {"case": CASE, "label": "kidney", "positive": False, "world": points, "radius": 2}
    assert client.post("/api/scribble", json={**stroke, "positive": True}).json()["revision"] == 2
    update = client.post("/api/scribble", json=stroke).json()
    assert [mark["positive"] for mark in update["marks"]] == [True, True, False]
    client.post("/api/undo", json={"case": CASE})
    whole = client.get("/api/label_map").json()
    apply(whole)
    assert whole["revision"] == 4
    assert client.post("/api/suggest_slice", json={"case": CASE}).json() == {
        "axis": 2,
        "index": 15,  # slice 4 of 20, on an axis that is flipped
    }

    saved = client.post("/api/save", json={"case": CASE}).json()
    label_map = SimpleITK.ReadImage(saved["label_map"])
    assert np.array_equal(SimpleITK.GetArrayFromImage(label_map), session.result)
    assert json.loads(Path(saved["prompts"]).read_text())["interactions"][0]["label"] == "spleen"
    assert sorted(p.name for p in workspace_of_two.output.rglob("*")) == [
        f"{CASE}.json", f"{CASE}.nii.gz", "prompts",
    ]  # fmt: skip
    assert client.get("/api/cases").json()["cases"][1]["saved"] is True
    apply(client.post("/api/reset", json={"case": CASE}).json())
    assert np.array_equal(session.result, session.automatic)


def test_a_click_that_changes_nothing_sends_nothing(client: TestClient, session: Any) -> None:
    open_case(client)
    client.post("/api/point", json=point(session))
    update = client.post("/api/point", json=point(session)).json()
    assert (update["box"], update["voxels"], update["revision"]) == (None, None, 2)


def test_updates_are_quick() -> None:
    """256 x 256 x 32, all of it changed: 100 ms at most on an idle core."""
    blocks = np.random.default_rng(0).integers(0, 4, (8, 16, 16)).astype(np.uint8)
    label_map = blocks.repeat(4, 0).repeat(16, 1).repeat(16, 2)
    label_map[0] = label_map[-1] = 1
    grid = Grid(label_map.shape, np.diag([-1.0, -1.0, 1.0, 1.0]))
    start = time.process_time()
    box = changed_box(np.zeros_like(label_map), label_map)
    packed = pack(grid.to_display(label_map))
    seconds = time.process_time() - start
    assert box == ((0, 32), (0, 256), (0, 256))
    assert len(packed) < 200_000  # bytes, of 2 MiB
    assert seconds < 0.3


def test_image_is_what_the_page_shows(client: TestClient, session: Any) -> None:
    open_case(client)
    answer = client.get("/api/image")
    image = nibabel.Nifti1Image.from_bytes(answer.content)
    assert (
        np.sort(np.asarray(image.dataobj).ravel()).tolist()
        == np.sort(session.array.ravel()).tolist()
    )
    refused(client.get("/api/image?channel=1"), 404, "invalid")
    refused(client.get("/api/image?channel=-1"), 404, "invalid")
    refused(client.get("/api/image?channel=x"), 422, "invalid")


BAD_MESSAGES: list[tuple[dict[str, Any], str, str]] = [
    ({"label": "heart"}, "label", "The model has no class 'heart'. It has: liver, spleen, kidney."),
    ({"label": 2}, "invalid", "label: Input should be a valid string."),
    ({"label": ""}, "label", "no class ''"),
    ({"world": [9999.0, 0.0, 0.0]}, "outside", "(9999.0, 0.0, 0.0) mm lies outside the image"),
    ({"world": [0.0, 0.0]}, "invalid", "world: List should have at least 3 items"),
    ({"world": ["1", 2.0, 3.0]}, "invalid", "world.0: Input should be a valid number."),
    ({"world": [True, 2.0, 3.0]}, "invalid", "world.0: Input should be a valid number."),
    ({"world": [None, 2.0, 3.0]}, "invalid", "world.0: Input should be a valid number."),
    ({"world": None}, "invalid", "world: Input should be a valid list."),
    ({"positive": "yes"}, "invalid", "positive: Input should be a valid boolean."),
    ({"case": "abdomen_01"}, "other_case", "abdomen_02 is open by now, not abdomen_01"),
    ({"more": 1}, "invalid", "more: Extra inputs are not permitted."),
]


@pytest.mark.parametrize(("changed", "reason", "words"), BAD_MESSAGES, ids=str)
def test_a_bad_click_is_one_sentence_and_changes_nothing(
    client: TestClient, session: Any, changed: dict[str, Any], reason: str, words: str
) -> None:
    open_case(client)
    client.post("/api/point", json=point(session))
    before, calls = session.result.copy(), list(session.calls)
    answer = client.post("/api/point", json=point(session, **changed))
    status = 409 if reason == "other_case" else 422
    assert words in refused(answer, status, reason)
    assert np.array_equal(session.result, before)
    assert session.calls == calls


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('{"case": "abdomen_02", ', "The request is not valid JSON"),
        ("", "body: Field required."),
        ("[]", "body: Input should be a valid dictionary"),
        ('"text"', "body: Input should be a valid dictionary"),
        ("\x00\xff", "not valid JSON"),
        ('{"case": "abdomen_02", "label": "spleen", "positive": true, "world": [NaN, 0, 0]}',
         "world.0: Input should be a finite number."),
        ('{"case": "abdomen_02", "label": "spleen", "positive": true, "world": [1e999, 0, 0]}',
         "world.0: Input should be a finite number."),
    ],
)  # fmt: skip
def test_broken_json_is_one_sentence(
    client: TestClient, session: Any, body: str, words: str
) -> None:
    open_case(client)
    headers = {"Content-Type": "application/json"}
    answer = client.post("/api/point", content=body.encode("latin-1"), headers=headers)
    assert words in refused(answer, 422, "invalid")
    nested = client.post("/api/point", content="[" * 100_000, headers=headers)
    assert "error parsing the body" in refused(nested, 400, "http")
    assert session.calls == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"radius": 0}, "radius: Input should be greater than 0."),
        ({"radius": 51}, "radius: Input should be less than or equal to 50."),
        ({"radius": "2"}, "radius: Input should be a valid number."),
        ({"world": []}, "world: List should have at least 1 item"),
        ({"world": [[0.0, 0.0, 0.0]] * 10_001}, "at most 10000 items"),
    ],
    ids=["zero", "large", "text", "empty", "long"],
)
def test_a_bad_scribble_is_one_sentence(
    client: TestClient, session: Any, changed: dict[str, Any], words: str
) -> None:
    open_case(client)
    inside = [world(session, (9, 40, 60))]
    stroke = {"case": CASE, "label": "liver", "positive": True, "world": inside, "radius": 2.0}
    assert words in refused(
        client.post("/api/scribble", json={**stroke, **changed}), 422, "invalid"
    )
    far = {**stroke, "world": [*inside, [0.0, 0.0, 9e9]]}
    refused(client.post("/api/scribble", json=far), 422, "outside")
    assert session.calls == []


def chunks(size: int) -> Any:
    for _ in range(size // 1024):
        yield b" " * 1024


def test_large_bodies_are_refused_whatever_they_announce(client: TestClient) -> None:
    for content in (b" " * (MAX_BODY + 1), chunks(MAX_BODY + 1024)):
        answer = client.post("/api/point", content=content)
        assert "larger than 1048576 bytes" in refused(answer, 413, "too_large")
    refused(client.post("/api/point", content=b" " * MAX_BODY), 422, "invalid")


@pytest.mark.parametrize("token", ["", "wrong", "the-right-token ", "The-right-token"])
def test_without_the_token_only_the_page_is_there(client: TestClient, token: str) -> None:
    client.headers["Authorization"] = f"Bearer {token}"
    paths = ["state", "cases", "image", "label_map", "nothing"]
    for answer in [
        *(client.get(f"/api/{path}") for path in paths),
        *(client.post(f"/api/{path}") for path in ("open", "point", "save", "undo", "reset")),
        client.post("/"),
        client.post("/static/main.js"),
        client.options("/api/state"),
        client.get("/openapi.json"),
    ]:
        assert "printed last" in refused(answer, 401, "token")
        assert "access-control-allow-origin" not in answer.headers
    headers = [(b"authorization", b"Bearer \xe9")]
    refused(client.get("/api/state", headers=headers), 401, "token")
    del client.headers["Authorization"]
    refused(client.get("/api/state"), 401, "token")
    assert client.get("/").status_code == client.get("/static/main.js").status_code == 200


def test_tokens_are_long_and_never_the_same() -> None:
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100
    assert min(map(len, tokens)) >= 43


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:8000", "", "[::1]:80", "x"]
)
def test_another_host_name_is_refused(client: TestClient, host: str) -> None:
    for path in ("/api/state", "/", "/static/main.js"):
        refused(client.get(path, headers={"Host": host}), 400, "host")


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:1", "localhost"])
def test_this_machine_is_answered(client: TestClient, host: str) -> None:
    answer = client.get("/api/state", headers={"Host": host, "Origin": "http://evil.example"})
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers
    assert "script-src 'self'" in answer.headers["content-security-policy"]
    assert answer.headers["x-frame-options"] == "DENY"


@pytest.mark.parametrize(
    "path", ["/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py"]
)
def test_static_files_stay_in_their_folder(client: TestClient, path: str) -> None:
    assert client.get(path).status_code in (401, 404)


@pytest.mark.parametrize(
    "name", ["../x", "..", "/etc/passwd", "abdomen_02/..", "", "a\x00b", "x" * 999]
)
def test_a_case_is_a_name_from_the_list(client: TestClient, session: Any, name: str) -> None:
    answer = client.post("/api/open", json={"case": name})
    assert "Choose one from the list" in refused(answer, 404, "case")
    assert session.opened == []


def test_links_out_of_the_folders_are_refused(
    client: TestClient, session: Any, workspace_of_two: Workspace, tmp_path: Path
) -> None:
    images, output = workspace_of_two.images, workspace_of_two.output
    secret = tmp_path / "secret.nii.gz"
    secret.write_bytes((images / f"{CASE}_0000.nii.gz").read_bytes())
    (images / "linked_0000.nii.gz").symlink_to(secret)
    assert list(client.get("/api/cases").json()["faults"]) == ["linked"]
    refused(client.post("/api/open", json={"case": "linked"}), 403, "case")
    assert session.opened == []
    open_case(client)
    before = secret.read_bytes()
    for link, target in ((output / f"{CASE}.nii.gz", secret), (output / "prompts", tmp_path)):
        link.symlink_to(target)
        message = {"case": CASE, "overwrite": True}
        assert "nothing is lost" in refused(client.post("/api/save", json=message), 403, "link")
        link.unlink()
    assert secret.read_bytes() == before
    assert not list(output.iterdir())


def test_before_a_case_is_open(client: TestClient) -> None:
    for path in ("undo", "reset", "save", "suggest_slice"):
        answer = client.post(f"/api/{path}", json={"case": CASE})
        assert "Choose one first" in refused(answer, 409, "no_case")
    for path in ("image", "label_map"):
        refused(client.get(f"/api/{path}"), 409, "no_case")
    refused(client.get("/api/nothing"), 404, "http")
    refused(client.get("/api/point"), 405, "http")


def test_while_a_case_is_being_opened(client: TestClient, session: Any) -> None:
    session.may_open.clear()
    client.post("/api/open", json={"case": CASE})
    end = time.monotonic() + 10
    while client.get("/api/state").json()["case"] is None:  # the image comes first
        assert time.monotonic() < end
    state = client.get("/api/state").json()
    assert state["opening"]["case"] == CASE
    assert state["case"]["ready"] is False
    assert client.get("/api/image").status_code == 200
    for path, message in (("undo", {}), ("open", {}), ("save", {})):
        answer = client.post(f"/api/{path}", json={"case": CASE, **message})
        assert "is being opened" in refused(answer, 409, "busy")
    session.may_open.set()
    assert wait_for_opening(client)["case"]["ready"] is True


def test_a_broken_image_leaves_the_open_case_alone(
    client: TestClient, session: Any, workspace_of_two: Workspace
) -> None:
    open_case(client)
    client.post("/api/point", json=point(session))
    before = session.result.copy()
    path = workspace_of_two.images / "abdomen_01_0000.nii.gz"
    path.write_bytes(gzip.compress(b"no image"))
    refused(client.post("/api/open", json={"case": "abdomen_01"}), 409, "unsaved")
    client.post("/api/open", json={"case": "abdomen_01", "discard": True})
    state = wait_for_opening(client)
    assert "cannot be read as an image" in state["failure"]
    assert (state["case"]["name"], state["case"]["unsaved"]) == (CASE, True)
    assert np.array_equal(session.result, before)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (InputError("the model was trained on two channels"), "trained on two channels"),
        (MemoryError("out of memory"), "could not be opened (MemoryError: out of memory)"),
    ],
)
def test_a_model_that_cannot_open_says_so(
    client: TestClient, session: Any, error: Exception, words: str
) -> None:
    session.error = error
    state = open_case(client)
    assert words in state["failure"]
    assert state["case"] is None
    session.error = None
    assert open_case(client)["case"]["ready"] is True


@pytest.mark.parametrize("path", ["point", "undo", "reset", "suggest_slice"])
def test_a_model_that_fails_leaves_the_result(client: TestClient, session: Any, path: str) -> None:
    open_case(client)
    client.post("/api/point", json=point(session))
    before = session.result.copy()
    message = point(session) if path == "point" else {"case": CASE}
    session.error = RuntimeError("CUDA error")
    answer = client.post(f"/api/{path}", json=message)
    assert "(RuntimeError: CUDA error)" in refused(answer, 500, "failed")
    session.error = ValueError("the click lies in padding")
    answer = client.post(f"/api/{path}", json=message)
    assert refused(answer, 422, "invalid") == "the click lies in padding"
    session.error = None
    assert np.array_equal(session.result, before)
    assert client.post("/api/undo", json={"case": CASE}).status_code == 200
    refused(client.post("/api/undo", json={"case": CASE}), 409, "nothing")
    refused(client.post("/api/suggest_slice", json={"case": CASE}), 409, "nothing")


def test_an_unforeseen_mistake_is_one_sentence(client: TestClient, session: Any) -> None:
    open_case(client)
    session.prompts = lambda: {}
    answer = client.post("/api/point", json=point(session))
    assert "The server made a mistake (KeyError" in refused(answer, 500, "failed")


def test_saving_keeps_an_earlier_result_unless_told(
    client: TestClient, session: Any, workspace_of_two: Workspace
) -> None:
    path = workspace_of_two.output / f"{CASE}.nii.gz"
    path.write_bytes(b"work of yesterday")
    open_case(client)
    assert "earlier" in refused(client.post("/api/save", json={"case": CASE}), 409, "exists")
    assert path.read_bytes() == b"work of yesterday"
    assert client.post("/api/save", json={"case": CASE, "overwrite": True}).status_code == 200
    client.post("/api/point", json=point(session))
    assert client.post("/api/save", json={"case": CASE}).status_code == 200  # our own
    session.error = OSError("No space left on device")
    before = path.read_bytes()
    client.post("/api/save", json={"case": CASE})
    assert path.read_bytes() == before
    assert "nothing is lost" in client.post("/api/save", json={"case": CASE}).json()["error"]


def test_workspace_of_folders_that_cannot_be_used(
    make_workspace: Callable[..., Workspace], tilted: Any, tmp_path: Path
) -> None:
    dataset = make_workspace(a=tilted((1, 1, 1))).dataset
    images = tmp_path / "images"
    with pytest.raises(InputError, match="does not exist"):
        Workspace.of(tmp_path / "nowhere", tmp_path / "out", dataset)
    with pytest.raises(InputError, match="Give another folder for results"):
        Workspace.of(images, images, dataset)
    with pytest.raises(InputError, match="cannot be made"):
        Workspace.of(images, images / "a_0000.nii.gz" / "out", dataset)
