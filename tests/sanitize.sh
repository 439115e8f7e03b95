#!/bin/sh
# make sanitize: the tests of the compiled module with it built for gcc's sanitizers: for races between threads first, then
# for memory and undefined behaviour. Python itself is not built for them, so what they see is the module's own.
set -eu
cd "$(dirname "$0")/.."
repository=$(pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Programs that the tests start must not load a sanitizer.
echo 'import os; os.environ.pop("LD_PRELOAD", None)' > "$work/unload.py"

check() {
    sanitizers=$1; shift
    tree="$work/$sanitizers"
    libraries=
    for name in "$@"; do libraries="$libraries $(gcc -print-file-name="lib$name.so")"; done
    CFLAGS="-O1 -g -fsanitize=$sanitizers" LDFLAGS="-fsanitize=$sanitizers" \
        "$repository/.venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --target "$tree" "$repository"
    nm -D "$tree"/proxy/_fastpath.*.so | grep -q "__$1_" || { echo "the module was not built for $sanitizers" >&2; exit 1; }
    cp -r tests pyproject.toml "$tree"
    echo "$sanitizers:"
    # Without address space randomization, which older runtimes can't cope with.
    (cd "$tree" && TSAN_OPTIONS=exitcode=66 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
        PYTHONPATH="$tree:$work" setarch -R env LD_PRELOAD="$libraries" "$repository/.venv/bin/python" -m pytest \
        -qs -p unload -p no:cacheprovider -p no:xdist tests/proxy/test_fastpath_thread.py tests/proxy/test_fastpath.py)
}

check thread tsan
check address,undefined asan ubsan
