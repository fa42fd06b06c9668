"""Train the digits MoE of `moec demo` from nothing, in about half a minute of one CPU core.

    python examples/train_digits.py                   # train and print the accuracy
    python examples/train_digits.py --out my_weights  # also write the two files that the demo ships

Needs scikit-learn and safetensors beside moec (scikit-learn carries the digits, nothing is downloaded).

Protocol
--------
The set has 1,797 images. The last 450 in the set's own order are held out; training sees the first 1,347 and nothing
else. There is no shuffle before the split: neighbouring images are often by the same hand, and a shuffled split would
put the same hand on both sides. Number of epochs, batch size and learning rate were chosen on the last 347 training
images with models trained on the first 1,000 (`--validate` repeats that), not on the held-out images. The weights of
the last step are kept, rounded to f16, and the accuracy printed is that of the rounded weights.

Seeds and the number of threads are fixed, so one machine gives the same bits again. Another kind of CPU may sum in
another order: its weights differ in the last digits and its accuracy by a few images.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor

from moec.demo.data import HELD_OUT, WEIGHTS
from moec.demo.model import DigitsMoE

NUM_HELD_OUT = 450
NUM_VALIDATION = 347
EPOCHS = 60
BATCH = 64
LEARNING_RATE = 2e-3
AUX_WEIGHT = 0.01
SOURCE = (
    "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository (1998), "
    "doi 10.24432/C50P49, CC BY 4.0; the last 450 images of its test set as scikit-learn's load_digits() orders them"
)


def load_split(validate: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Grey levels u8 [N, 8, 8] and labels u8 [N] to train on, then those to judge by."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.uint8)
    labels = torch.from_numpy(digits.target).to(torch.uint8)
    num_train = len(images) - NUM_HELD_OUT
    if validate:
        images, labels = images[:num_train], labels[:num_train]
        num_train -= NUM_VALIDATION
    return images[:num_train], labels[:num_train], images[num_train:], labels[num_train:]


def shift(images: Tensor) -> Tensor:
    """images[B, 8, 8], each moved by up to one pixel in each direction."""
    num_images = len(images)
    row, column = torch.randint(0, 3, (2, num_images, 1)).unbind(0)
    pixel = torch.arange(8)
    padded = F.pad(images, (1, 1, 1, 1))
    return padded[torch.arange(num_images)[:, None, None], (row + pixel)[:, :, None], (column + pixel)[:, None, :]]


def train(images: Tensor, labels: Tensor, *, epochs: int = EPOCHS) -> DigitsMoE:
    """A model trained on images[N, 8, 8] u8 and labels[N] u8."""
    torch.manual_seed(0)
    model = DigitsMoE().train()
    x, y = images.float() / 16, labels.long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    num_steps = epochs * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=num_steps)
    for epoch in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(x)).split(BATCH):
            loss = F.cross_entropy(model(shift(x[batch])), y[batch])
            total += loss.item() * len(batch)
            aux = sum(block.moe.aux_loss for block in model.blocks)
            optimizer.zero_grad()
            (loss + AUX_WEIGHT * aux).backward()
            optimizer.step()
            schedule.step()
        if epoch % 10 == 9 or epoch + 1 == epochs:
            print(f"epoch {epoch + 1:3}  loss {total / len(x):.4f}", flush=True)
    return model.eval()


@torch.no_grad()
def round_to_f16(model: DigitsMoE) -> None:
    """Give the weights the precision in which they are shipped."""
    for parameter in model.parameters():
        parameter.copy_(parameter.half())


@torch.no_grad()
def count_correct(model: DigitsMoE, images: Tensor, labels: Tensor) -> int:
    return int((model(images.float() / 16).argmax(dim=-1) == labels.long()).sum())


def save(out: Path, model: DigitsMoE, images: Tensor, labels: Tensor, correct: int) -> None:
    """Write the rounded weights and the held-out digits (u8) as the demo reads them."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, out / WEIGHTS, metadata={"accuracy": f"{correct} of {len(labels)} held-out images right"})
    digits = {"images": images.contiguous(), "labels": labels.contiguous()}
    save_file(digits, out / HELD_OUT, metadata={"source": SOURCE})
    for name in (WEIGHTS, HELD_OUT):
        print(f"wrote {out / name}: {(out / name).stat().st_size:,} bytes")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the digits MoE of `moec demo`.")
    parser.add_argument("--out", type=Path, help="folder to write the weights and the held-out digits to")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--validate", action="store_true", help="judge on a part of the training images instead")
    args = parser.parse_args(argv)
    if args.validate and args.out:
        parser.error("--validate trains on fewer images: its weights are not for --out")

    # One thread: the matrices are small, and the order of every sum stays the same.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    train_images, train_labels, images, labels = load_split(args.validate)
    started, cpu_started = time.perf_counter(), time.process_time()
    model = train(train_images, train_labels, epochs=args.epochs)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    round_to_f16(model)
    correct = count_correct(model, images, labels)
    print(f"parameters {sum(p.numel() for p in model.parameters()):,}")
    print(f"trained on {len(train_images):,} images in {seconds:.1f} s ({cpu_seconds:.1f} s of CPU)")
    name = "validation" if args.validate else "held-out"
    print(f"accuracy on {len(labels)} {name} images: {correct / len(labels):.4f} ({correct} right)")
    if args.out:
        save(args.out, model, images, labels, correct)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
