import pytest

from agent.runtimes.containerd.filters import FilterError, parse_filters, snapshot_fields

FIELDS = snapshot_fields(
    "default/3/sha256:aa", "default/1/sha256:bb", "committed", {"containerd.io/snapshot.ref": "sha256:aa", "a.b": "c d", "l": "1"}
)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "kind==committed",
        "name==default/3/sha256:aa",
        'labels."containerd.io/snapshot.ref"==sha256:aa,parent=="default/1/sha256:bb"',  # as containerd asks
        'labels."containerd.io/snapshot.ref"==sha256:aa , kind==committed',
        "labels.l",
        "labels.l==1",
        'labels.a.b=="c d"',
        'labels."a.b"=="c\\x20d"',
        'labels."a.b"=="c\\u0020d"',
        'labels."a.b"=="c\\040d"',
        "labels.absent!=1",
        "labels.l!=2",
        "name~=/sha256/",
        "name~=|^default/[0-9]+/|",
        "name~=sha256:a+",
        r'name~="^default\\/\\d"',
        'labels.absent~=""',
        'parent!=""',
    ],
)
def test_matches(text: str) -> None:
    assert parse_filters([text]).matches(FIELDS)


@pytest.mark.parametrize(
    "text",
    [
        "kind==active",
        "name==default/3/sha256:a",
        "labels.absent",
        "labels.absent==1",
        "labels",
        "nothing",
        "nothing==1",
        "labels.l,labels.absent",
        "labels.l!=1",
        "name~=/^sha256/",
        'parent==""',
    ],
)
def test_does_not_match(text: str) -> None:
    assert not parse_filters([text]).matches(FIELDS)


def test_one_of_several_filters_is_enough_and_none_takes_all() -> None:
    assert parse_filters(["kind==active", "labels.l==1"]).matches(FIELDS)
    assert not parse_filters(["kind==active", "labels.l==2"]).matches(FIELDS)
    assert parse_filters([]).matches(FIELDS)


@pytest.mark.parametrize(
    "text",
    [
        ",",
        "name==",
        "name=a",
        "name===a",
        "name==a b",
        "name==a,",
        'name=="a',
        'name=="a\n"',
        'name=="\\q"',
        'name=="\\x1"',
        'name=="\\777"',
        'name=="\\U00110000"',
        "name==/a/",
        "name~=/(/",
        "==a",
        "labels.==a",
        "'name'==a",
        "name" * 20000,
    ],
)
def test_bad_syntax_is_told(text: str) -> None:
    with pytest.raises(FilterError):
        parse_filters([text])
