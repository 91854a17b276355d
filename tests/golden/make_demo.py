"""Make the demo's files: a published network, an adapter by Hugging Face PEFT, and its merge.

The network is `nn-medium` of the package neuralfoil (Peter Sharpe, MIT licence): the aerodynamics
of an airfoil from its shape and the flow. The adapter teaches it what the four times larger
`nn-xlarge` says about lift, drag and moment of NACA four-digit sections at low Reynolds numbers.
Run as ``python -m tests.golden.make_demo`` in an environment with peft, torch and neuralfoil
(``pip install --no-deps neuralfoil``); with ``--check`` the committed files are compared instead:
the network with the package's, and the merge with what the installed PEFT makes of the adapter.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file

OUT = Path(__file__).parents[2] / "peft_any" / "demo" / "data"
ADAPTED = r"net\.[0246]"
"""All linear layers but the last."""
TAUGHT = slice(1, 4)
"""The outputs that are taught: 2·CL, ½·ln CD + 2 and 20·CM."""
KEPT = 4
"""Outputs of the large network that are kept, those that nobody asks for left out."""
STEPS = 2000
PLAIN = {"format": "pt"}
"""The files' metadata; with more than one entry their bytes would change from run to run."""


class Net(torch.nn.Module):
    """The network of a neuralfoil file: linear layers with a swish between any two."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        super().__init__()
        layers: list[torch.nn.Module] = []
        matrices = {int(k.split(".")[1]): v for k, v in weights.items() if v.ndim == 2}
        for _, matrix in sorted(matrices.items()):
            n_out, n_in = matrix.shape
            layers += [torch.nn.Linear(n_in, n_out), torch.nn.SiLU()]
        self.net = torch.nn.Sequential(*layers[:-1])
        self.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def published(size: str) -> dict[str, np.ndarray]:
    """Read a network from the installed package, without importing it (it needs aerosandbox)."""
    spec = find_spec("neuralfoil")
    assert spec, "pip install --no-deps neuralfoil"
    path = Path(str(spec.origin)).parent / "nn_weights_and_biases" / f"nn-{size}.npz"
    return {k: np.ascontiguousarray(v) for k, v in np.load(path).items()}


def large() -> dict[str, np.ndarray]:
    """Give the large network with the first rows of its last layer alone."""
    weights = published("xlarge")
    rows = {
        k: np.ascontiguousarray(v[:KEPT]) for k, v in weights.items() if k.startswith("net.10.")
    }
    return weights | rows


def section(camber: float, place: float, thickness: float) -> np.ndarray:
    """Fit the 18 shape parameters (Kulfan's class-shape functions) to a NACA four-digit section."""
    x = (1 - np.cos(np.linspace(0.02, np.pi, 80))) / 2
    powers = (0.2969 * x**0.5, -0.1260 * x, -0.3516 * x**2, 0.2843 * x**3, -0.1036 * x**4)
    half = 5 * thickness * sum(powers)
    front = camber / place**2 * (2 * place * x - x**2)
    back = camber / (1 - place) ** 2 * (1 - 2 * place + 2 * place * x - x**2)
    line = np.where(x < place, front, back)
    binomial = [1, 7, 21, 35, 35, 21, 7, 1]
    shape = np.stack([c * x**i * (1 - x) ** (7 - i) for i, c in enumerate(binomial)], axis=1)
    shape = shape * (x**0.5 * (1 - x))[:, None]
    edge = (x * (1 - x) ** 8.5)[:, None]
    none = np.zeros_like(shape)
    upper = np.hstack([shape, none, edge, x[:, None] / 2])
    lower = np.hstack([none, shape, edge, -x[:, None] / 2])
    surface = np.concatenate([line + half, line - half])
    fit: np.ndarray = np.linalg.lstsq(np.vstack([upper, lower]), surface, rcond=None)[0]
    return fit


def flights(n: int, seed: int) -> np.ndarray:
    """Draw inputs (n, 25): sections and flows of small gliders."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        shape = section(rng.uniform(0.01, 0.04), rng.uniform(0.3, 0.5), rng.uniform(0.10, 0.14))
        alpha, reynolds = np.radians(rng.uniform(-4, 10)), np.exp(rng.uniform(*np.log([4e4, 2e5])))
        flow = [np.sin(2 * alpha), np.cos(alpha), np.sin(alpha) ** 2]
        shape[17] *= 50
        rows.append([*shape, *flow, (np.log(reynolds) - 12.5) / 3.5, 0.0, 1.0, 1.0])
    return np.asarray(rows, dtype="float32")


def mirror() -> tuple[np.ndarray, np.ndarray]:
    """Give order and signs of the inputs of the same flight seen upside down."""
    order, sign = np.arange(25), np.ones(25, dtype="float32")
    order[:16], order[23:] = np.r_[8:16, 0:8], (24, 23)
    sign[:17] = sign[18] = -1
    return order, sign


def taught(net: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Average the three outputs over the flight and its mirror image, as neuralfoil does."""
    order, sign = map(torch.from_numpy, mirror())
    back = torch.tensor([-1.0, 1.0, -1.0])
    return (net(x)[:, TAUGHT] + back * net(x[:, order] * sign)[:, TAUGHT]) / 2


def train() -> PeftModel:
    """Fit the adapter to the large network's answers."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=ADAPTED)
    model = get_peft_model(Net(published("medium")), config)
    x = torch.from_numpy(flights(2000, seed=1))
    with torch.no_grad():
        want = taught(Net(published("xlarge")), x)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        batch = torch.randint(len(x), (256,))
        loss = torch.mean((taught(model, x[batch]) - want[batch]) ** 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def merged(adapter: Path) -> dict[str, np.ndarray]:
    """Merge an adapter directory with PEFT."""
    model = PeftModel.from_pretrained(Net(load_file(OUT / "nn-medium.safetensors")), adapter)
    return {k: v.numpy() for k, v in model.merge_and_unload().state_dict().items()}


def make() -> None:
    """Write every file."""
    OUT.mkdir(exist_ok=True)
    save_file(published("medium"), OUT / "nn-medium.safetensors", metadata=PLAIN)
    save_file(large(), OUT / "nn-xlarge.safetensors", metadata=PLAIN)
    licence = distribution("neuralfoil").read_text("licenses/LICENSE.txt")
    (OUT / "LICENSE.neuralfoil").write_text(
        "nn-medium.safetensors, nn-xlarge.safetensors (of the last layer the first four rows) and "
        "merged.safetensors hold weights of neuralfoil; flights.safetensors holds outputs of its "
        f"nn-xlarge.\n\n{licence}"
    )
    model = train()
    model.save_pretrained(OUT / "adapter")
    (OUT / "adapter" / "README.md").unlink()
    path = OUT / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": "nn-medium"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True))
    save_file(merged(OUT / "adapter"), OUT / "merged.safetensors", metadata=PLAIN)

    x = flights(100, seed=2)
    order, sign = mirror()
    with torch.no_grad():
        answers = taught(Net(published("xlarge")), torch.from_numpy(x)).numpy()
    cases = {"inputs": x, "mirror_order": order, "mirror_sign": sign, "nn_xlarge": answers}
    save_file(cases, OUT / "flights.safetensors", metadata=PLAIN)
    for file in OUT.rglob("*.safetensors"):
        file.chmod(0o644)


def check() -> None:
    """Compare the committed files with the package's networks and the installed PEFT's merge."""
    for size, weights in (("medium", published("medium")), ("xlarge", large())):
        for name, want in weights.items():
            np.testing.assert_array_equal(load_file(OUT / f"nn-{size}.safetensors")[name], want)
    for name, want in merged(OUT / "adapter").items():
        np.testing.assert_allclose(load_file(OUT / "merged.safetensors")[name], want, atol=1e-6)


def report() -> None:
    """Print how large the adapter is, and what it does on flights it has not seen."""
    base, after = (load_file(OUT / f"{n}.safetensors") for n in ("nn-medium", "merged"))
    for name in base:
        change = np.linalg.norm(after[name] - base[name]) / np.linalg.norm(base[name])
        print(f"{name}: changed by {change:.3%}")
    cases = load_file(OUT / "flights.safetensors")
    for label, weights in (("base", base), ("merged", after)):
        with torch.no_grad():
            got = taught(Net(weights), torch.from_numpy(cases["inputs"])).numpy()
        miss = np.abs(got - cases["nn_xlarge"]).mean(axis=0)
        print(f"{label}: lift off by {miss[0] / 2:.4f}, drag by {2 * miss[1]:.2%}")


if __name__ == "__main__":
    check() if "--check" in sys.argv[1:] else make()
    report()
