"""What only an owner may know of an address is never shown."""

import pytest

from agl_bench.addresses import MASK, is_ambiguous, masked

SECRET = "s3cr"  # part of every secret below


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql://me:s3cr@host:5432/db", "postgresql://***@host:5432/db"),
        ("postgresql+psycopg://me:p@s3cr:w/s3cr@host/db", "postgresql+psycopg://***@host/db"),
        ("postgresql://me:s3?cr@host/db", "postgresql://***@host/db"),
        ("postgresql://me:s3#cr@host/db", "postgresql://***@host/db"),
        ("mysql://me:s3%40cr@host/db", "mysql://***@host/db"),
        ("https://s3cr@host/api", "https://***@host/api"),
        ("http://me%3As3cr%40host/", "http://***@host/"),
        ("redis://:s3cr@host", "redis://***@host"),
        ("nobody+knows.it://me:s3cr@host", "nobody+knows.it://***@host"),
        ("s3://AKIA:s3cr@bucket/key", "s3://***@bucket/key"),
        ("http://host:5000/?password=s3cr", "http://host:5000/?password=***"),
        ("https://host/x?token=s3cr&mode=ro", "https://host/x?token=***&mode=ro"),
        ("https://host/x?X-Amz-Signature=s3cr", "https://host/x?X-Amz-Signature=***"),
        ("http://host/?p%61ssword=s3cr", "http://host/?p%61ssword=***"),
        ("http://host/?s3cr", "http://host/?***"),
        ("mssql+pyodbc:///?odbc_connect=PWD%3Ds3cr", "mssql+pyodbc:///?odbc_connect=***"),
        ("sqlserver://host;user=sa;password=s3cr", "sqlserver://host;user=sa;password=***"),
        ("me:s3cr@host:5432/db", "***@host:5432/db"),
        ("host=h password=s3cr dbname=x", "host=h password=*** dbname=x"),
        ("host=h password='s3 s3cr' dbname=x", "host=h password=*** dbname=x"),
        ('{"access_key": "s3cr"}', '{"access_key": ***}'),
        ("MLFLOW_TRACKING_TOKEN=s3cr", "MLFLOW_TRACKING_TOKEN=***"),
        ("DBPASS=s3cr", "DBPASS=***"),
        ("db.pass = 's3cr'", "db.pass = ***"),
        ("passphrase_2='s3cr'", "passphrase_2=***"),
        ("Authorization: Bearer s3crs3cr", "Authorization: Bearer ***"),
        ("refused by 'http://me:s3cr@host/a', twice", "refused by 'http://***@host/a', twice"),
    ],
)
def test_secrets_are_masked(address: str, shown: str) -> None:
    assert masked(address) == shown
    assert "s3" not in shown.replace("s3://", "")
    assert masked(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:5000",
        "http://[::1]:5000/x",
        "sqlite:////data/me@work/a b/mlflow.db",
        "see https://sqlalche.me/e/20/e3q8.",
        "no password supplied; a token: what is that",
        "donor@site.org has 5 spots",
        "C:/data/x.h5ad",
        "hest:TENX152,TENX89",
        "--set 'tiny.channels=8' of tiny",
        "clean with outer_passes=3, outer_pass_over='held_out'",
        "n_tokens=256, tokenizer='bpe', bypass=1",
        "TOKENIZERS_PARALLELISM=false",
        "dataset 'folder:/data/me/Drive-me@site.org/data' is not there",
    ],
)
def test_other_texts_stay(text: str) -> None:
    assert masked(text) == text and not is_ambiguous(text)


@pytest.mark.parametrize(
    "address",
    ["http://host:port", "http://host:50a/x", "postgresql://me:p@ss@host/db", "postgresql://me:a/b@host/db"],
)
def test_addresses_that_no_library_reads_right(address: str) -> None:
    assert is_ambiguous(address)


def test_what_no_file_can_hold_is_escaped() -> None:
    assert masked("folder/\udcff of http://me:s3cr@host") == "folder/\\udcff of http://***@host"


@pytest.mark.parametrize(
    "piece", ["x", "a-", "pass-", "a:(", "token='", "s://a@", "x" * 1999 + " ", "pass." * 300 + " "]
)
def test_a_text_of_a_megabyte_is_masked_too(piece: str) -> None:
    """By patterns that look at each character a few times: others would not come back before the test is ended."""
    text = piece * (2**20 // len(piece))
    assert masked(f"{text} token=s3cr") == f"{masked(text)} token={MASK}"
