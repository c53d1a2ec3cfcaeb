from launcher.doctor import Check, _find


def test_what_is_missing_fails_only_if_it_is_required():
    def broken():
        raise ImportError("libcuda.so\nnot found")

    assert _find(Check("x", True, broken)) == ("x", "failed", "libcuda.so not found")
    assert _find(Check("x", False, broken)) == ("x", "missing", "libcuda.so not found")
    assert _find(Check("x", True, lambda: "1.0")) == ("x", "ok", "1.0")
