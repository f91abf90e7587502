"""Launches and shared variables, written as C++."""

import pytest
from translate import translate


def body(source: str) -> str:
    first, _, rest = translate(source, "a.cu").partition("\n")
    assert first == '#line 1 "a.cu"'
    return rest


@pytest.mark.parametrize(
    "source, kernel, launch",
    [
        ("k<<<1, n>>>(a, b);", "k", "1, n"),
        ("ns::k<T, Pair<int, 2>><<<grid, 32, 0, s>>>(a);", "ns::k<T, Pair<int, 2>>", "grid, 32, 0, s"),
        ("if (x < y) k<(3 > 2)>\n<<<f(1, 2), 32>>>(a);", "k<(3 > 2)>", "f(1, 2), 32"),
    ],
)
def test_a_launch(source, kernel, launch):
    found = body(source)
    assert f'::emulator::launch("{kernel}", {{{launch}}}, ' in found
    assert f"{kernel}(arguments...);" in found
    assert "<<<" not in found
    assert found.endswith(source[source.index(">>>") + 3 :])


@pytest.mark.parametrize(
    "declaration, expected",
    [
        ("__shared__ bool last;", "auto& last = ::emulator::shared<bool>([] {});"),
        (
            "__shared__ uint32_t scratch[33], digit[kRanks];",
            "auto& scratch = ::emulator::shared<uint32_t[33]>([] {}); "
            "auto& digit = ::emulator::shared<uint32_t[kRanks]>([] {});",
        ),
        (
            "__shared__ Map<T, 2> maps[f(n[0])][4];",
            "auto& maps = ::emulator::shared<Map<T, 2>[f(n[0])][4]>([] {});",
        ),
        (
            "static __shared__ alignas(16) uint8_t tile[64];",
            "auto& tile = ::emulator::shared<uint8_t[64], 16>([] {});",
        ),
        ("alignas(8) __shared__ char c[2];", "auto& c = ::emulator::shared<char[2], 8>([] {});"),
        ("extern __shared__ float rows[];", "auto* rows = ::emulator::dynamic_shared<float>();"),
    ],
)
def test_shared_variables(declaration, expected):
    assert body(f"  {declaration} x();") == f"  {expected} x();"


def test_lines_keep_their_numbers_and_comments_are_no_code():
    source = 'a; // k<<<1, 2>>>(x)\n/* __shared__ int x;\n\n */ b("// s");\n__shared__ int\n  y;\nc;'
    found = body(source)
    assert found.count("\n") == source.count("\n")
    assert found.splitlines()[3].strip() == 'b("// s");'
    assert found.splitlines()[-1] == "c;"
    assert found.count("emulator") == 1


@pytest.mark.parametrize("source", ["a;\n<<<1, 2>>>(x);", "a;\n__shared__ int;", "a;\n__shared__ int x = 3;"])
def test_what_cannot_be_read_is_named(source):
    with pytest.raises(ValueError, match=r"a\.cu:2: cannot read"):
        translate(source, "a.cu")
