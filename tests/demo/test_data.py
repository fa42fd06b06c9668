"""The shipped weights and held-out digits are what their README says."""

from importlib import resources

import pytest
import torch

from moec.demo.data import HELD_OUT, WEIGHTS, load_held_out, load_model, read_tensors

CORRECT = 431


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = load_model()(load_held_out().images)
    return result


def test_accuracy_is_the_one_we_claim(logits: torch.Tensor) -> None:
    digits = load_held_out()
    correct = int((logits.argmax(dim=-1) == digits.labels).sum())
    assert correct == CORRECT
    assert read_tensors(WEIGHTS)[1] == {"accuracy": f"{CORRECT} of {digits.num_images} held-out images right"}
    assert f"{CORRECT} of the {digits.num_images}" in readme()
    assert f"{100 * CORRECT / digits.num_images:.1f} %" in readme()


def test_no_prediction_hangs_on_rounding(logits: torch.Tensor) -> None:
    """The two best logits of every image differ by far more than two machines' sums do."""
    best = logits.topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-3


def test_sizes_are_those_we_claim() -> None:
    files = [resources.files("moec.demo").joinpath(name) for name in (WEIGHTS, HELD_OUT)]
    assert sum(len(file.read_bytes()) for file in files) < 1_000_000
    assert sum(parameter.numel() for parameter in load_model().parameters()) == 430_154
    assert "430,154 parameters" in readme()


def test_model_is_loaded_whole() -> None:
    model = load_model()
    tensors, _ = read_tensors(WEIGHTS)
    assert not model.training
    assert set(tensors) == set(model.state_dict())
    assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())
    assert all(tensor.dtype == torch.float16 for tensor in tensors.values())


def test_digits_are_grey_levels_with_their_licence() -> None:
    tensors, metadata = read_tensors(HELD_OUT)
    assert tensors["images"].shape == (450, 8, 8)
    assert tensors["images"].dtype == tensors["labels"].dtype == torch.uint8
    assert int(tensors["images"].max()) == 16
    assert sorted(set(tensors["labels"].tolist())) == list(range(10))
    assert "CC BY 4.0" in metadata["source"]
    assert float(load_held_out().images.max()) == 1.0


def test_held_out_images_were_not_trained_on() -> None:
    """They are the last of the set, and none of them stands among the others."""
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    images = torch.from_numpy(load_digits().images).to(torch.uint8)
    held_out = read_tensors(HELD_OUT)[0]["images"]
    num_train = len(images) - len(held_out)
    assert torch.equal(images[num_train:], held_out)
    seen = {image.numpy().tobytes() for image in images[:num_train]}
    assert not any(image.numpy().tobytes() in seen for image in held_out)


def test_file_reads_as_safetensors_does() -> None:
    load_file = pytest.importorskip("safetensors.torch").load_file
    with resources.as_file(resources.files("moec.demo").joinpath(WEIGHTS)) as path:
        theirs = load_file(path)
    ours, _ = read_tensors(WEIGHTS)
    assert sorted(ours) == sorted(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def readme() -> str:
    return resources.files("moec.demo").joinpath("README.md").read_text(encoding="utf-8")
