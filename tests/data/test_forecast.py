"""What a large source will take is said once, early, and of a large source alone."""

import dataclasses

from moe_erc.data import forecast, streams
from moe_erc.data.forecast import Forecast
from moe_erc.data.sources import open_source
from moe_erc.data.tokenizer import ByteTokenizer


def test_the_line_extrapolates_the_first_documents(monkeypatch, capsys):
    now = iter([100.0, 108.0])
    monkeypatch.setattr(forecast.time, "monotonic", lambda: next(now))
    # 16 MiB of text gave 4 Mi tokens in 8 s. 1000 times as much takes 8,000 s, and 2 bytes for each
    # of 4.19 G tokens are 8.4 GB.
    measured = Forecast("/data/c4", 1000 * 2**24, token_bytes=2)
    measured.add(2**23, 2**21)
    assert not capsys.readouterr().err
    measured.add(2**23, 2**21)
    line = capsys.readouterr().err
    assert line.startswith("data '/data/c4': at least 16.8 GB of text; ")
    assert "at 524,288 tokens/s" in line and "about 2:13:20 here and 8.4 GB" in line
    assert line.count("\n") == 1 and "moe_erc.data.tokenize" in line
    measured.add(2**24, 2**22)
    assert not capsys.readouterr().err


def test_only_a_large_source_is_spoken_of(config, text_directory, tmp_path, monkeypatch, capsys):
    source = open_source(str(text_directory), config)
    assert source.bytes == (text_directory / "words.jsonl").stat().st_size
    for number, large in enumerate((source.bytes + 1, source.bytes)):
        monkeypatch.setattr(forecast, "LARGE", large)
        monkeypatch.setattr(forecast, "MEASURED", 100)
        directory = tmp_path / str(number)
        directory.mkdir()
        streams.write(directory, dataclasses.replace(source), ByteTokenizer())
        assert capsys.readouterr().err.count("on every host") == number
