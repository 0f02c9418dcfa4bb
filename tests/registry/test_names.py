import re
from pathlib import Path

import pytest

from tlpipe.errors import ParamsError
from tlpipe.registry import Registered, of_own, parse, registered
from tlpipe.registry.register import Params


@pytest.mark.parametrize(
    ("text", "name", "which"),
    [
        ("digits@champion", "digits", "champion"),
        ("digits@3", "digits", "3"),
        ("two words@my-alias", "two words", "my-alias"),
        ("models:/digits@3", "digits", "3"),
        ("models:/digits/3", "digits", "3"),
    ],
)
def test_a_registered_version_has_a_name_and_an_alias_or_number(
    text: str, name: str, which: str
) -> None:
    assert parse(text) == registered(text) == Registered(name, which)
    assert str(Registered(name, which)) == f"{name}@{which}"


@pytest.mark.parametrize("folder", ["bundle", "a@b", "models"])
def test_a_folder_is_a_folder_and_one_with_an_at_sign_is_written_with_a_slash(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(folder).mkdir()
    assert parse(f"./{folder}") == Path(folder)
    assert parse(str(tmp_path / folder)) == tmp_path / folder
    assert parse(folder) == (Registered("a", "b") if "@" in folder else Path(folder))


@pytest.mark.fault("R36")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "digits",
            "digits names no model: there is no such folder; expected NAME@ALIAS, NAME@VERS",
        ),
        ("digits", "such as digits@champion"),
        ("digits@", "digits@ names no registered version; expected NAME@ALIAS or NAME@VERSION"),
        ("@champion", "@champion names no registered version"),
        ("digits@a@b", "digits@a@b names no registered version"),
        ("it's@1", "it's@1 names no registered version"),
        ("models:/digits", "models:/digits names no registered version; expected models:/NAME@AL"),
        ("models:/digits@", "models:/digits@ names no registered version"),
        ("no/bundle", "no/bundle names no model: there is no such folder"),
        ("", "an empty text names no model"),
    ],
)
def test_what_names_no_model_is_an_error_with_the_forms_that_do(text: str, message: str) -> None:
    with pytest.raises(ParamsError, match=re.escape(message)):
        parse(text)


@pytest.mark.fault("R36")
def test_the_own_model_s_name_may_be_left_out_and_another_one_is_an_error(tmp_path: Path) -> None:
    assert of_own("3", "digits") == of_own("digits@3", "digits") == "3"
    assert of_own("challenger", "digits") == "challenger"
    assert of_own(str(tmp_path), "digits") == tmp_path
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path.parent)  # where a bundle may be named as an alias is
        folder = tmp_path.name
        assert parse(folder) == Path(folder)
        with pytest.raises(ParamsError, match=rf"write \./{folder}, or digits@{folder}"):
            of_own(folder, "digits")
        assert of_own(f"./{folder}", "digits") == Path(folder)
        assert of_own(f"digits@{folder}", "digits") == folder
    with pytest.raises(ParamsError, match=r"flowers@3 is a version of flowers; expected one of di"):
        of_own("flowers@3", "digits")


@pytest.mark.parametrize("name", ["digits", "two words", "ants-bees_2"])
def test_every_name_that_a_project_may_have_can_be_named(name: str) -> None:
    assert parse(f"{Params(name=name).name}@1") == Registered(name, "1")
