"""The layout installs as a wheel, works from the repository root and shadows nobody's package."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("vlmeff", "tokenpruning", "kvcache", "vlmeff_kernels")


def run(code: str, *, cwd: Path, path: list[Path] | None = None) -> str:
    """Run ``code`` in a fresh interpreter; what it prints."""
    env = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ":".join(map(str, path or []))}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from hatchling.builders.wheel import WheelBuilder

    folder = tmp_path_factory.mktemp("wheel")
    (built,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    return Path(built)


def test_the_wheel_is_pure_python_and_holds_the_four_packages_and_their_data(wheel: Path) -> None:
    assert wheel.name.endswith("py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names if ".dist-info" not in n}
    assert tops == set(PACKAGES)
    for package in PACKAGES:
        assert f"{package}/__init__.py" in names
        assert f"{package}/py.typed" in names
    assert "vlmeff/model_zoo.yaml" in names
    assert "vlmeff/models/tiny_llava/weights/model.safetensors" in names
    assert "vlmeff/models/tiny_llava/adaptinfer.json" in names
    assert "vlmeff/models/tiny_llava/prefixkv.json" in names
    assert "vlmeff/models/tiny_clip/weights/model.safetensors" in names


def test_an_unpacked_wheel_works_far_from_the_repository(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import vlmeff, tokenpruning, kvcache, vlmeff_kernels; from vlmeff import zoo;"
        "print(vlmeff.__file__); print(zoo.load_zoo().files[0]);"
        "model, processor = vlmeff.load('tiny-llava', preset='fast'); print(vlmeff.is_wrapped(model))"
    )
    lines = run(code, cwd=tmp_path, path=[tmp_path / "site"]).splitlines()
    assert lines[0].startswith(str(tmp_path))
    assert lines[1].startswith(str(tmp_path))
    assert lines[2] == "True"


def test_the_repository_root_works_without_an_install_of_the_kernels() -> None:
    code = "import sys; sys.modules['vlmeff_kernels'] = None\nimport torch\nfrom vlmeff import ops\n"
    code += "q = torch.randn(1, 2, 3, 4); print(ops.row_logsumexp(q, q, scale=1.0).shape)"
    assert "1, 2, 3" in run(code, cwd=ROOT)


def test_the_folder_kernels_does_not_shadow_the_hugging_face_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = (
        "import importlib.util as u; s = u.find_spec('kernels');"
        "print(s is None or s.origin is None or 'site-packages' in s.origin);"
        "from transformers.utils import is_kernels_available; print(isinstance(is_kernels_available(), bool));"
        "from transformers import LlamaForCausalLM"
    )
    assert run(code, cwd=ROOT).split() == ["True", "True"]


def test_an_installed_package_named_kernels_wins_over_the_folder(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("get_kernel = 'theirs'\n")
    # The repository root comes first on the path, as under ``python -m``.
    code = "import sys; sys.path.insert(0, ''); import kernels; print(kernels.get_kernel)"
    assert run(code, cwd=ROOT, path=[ROOT, tmp_path]).strip() == "theirs"


def test_importing_vlmeff_imports_neither_torch_nor_triton() -> None:
    heavy = ("torch", "transformers", "triton", "vlmeff_kernels")
    code = f"import sys, vlmeff; print([m for m in {heavy} if m in sys.modules])"
    assert run(code, cwd=ROOT).strip() == "[]"


@pytest.mark.parametrize("order", ["sorted(names)", "sorted(names, reverse=True)", "sorted(names, key=len)"])
def test_public_names_survive_every_order_of_use(order: str) -> None:
    """A submodule that carried the name of a public function would replace it when it is imported."""
    code = (
        "import types, vlmeff; names = [n for n in vlmeff.__all__ if n != '__version__']\n"
        f"first = [getattr(vlmeff, n) for n in {order}]\n"
        f"second = [getattr(vlmeff, n) for n in {order}]\n"
        "assert all(a is b for a, b in zip(first, second))\n"
        "print([x for x in first if isinstance(x, types.ModuleType) or not callable(x)])"
    )
    assert run(code, cwd=ROOT).strip() == "[]"


def test_no_python_file_stands_between_the_tests_and_other_packages() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert not (ROOT / "demos" / "__init__.py").exists()
