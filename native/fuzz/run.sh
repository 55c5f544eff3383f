#!/bin/sh
# The fuzz targets, under AddressSanitizer and UndefinedBehaviorSanitizer: each first runs its corpus, then makes up inputs for
# SECONDS. Usage: run.sh SECONDS [NAME…], for example: run.sh 60 pages. An input that fails is left in build/; put it into
# native/fuzz/corpus/NAME once it is mended. FUZZ_KEEP=DIR adds the smallest inputs that reach something new to DIR/NAME.
set -eu
cd "$(dirname "$0")/../.."

seconds=${1:?how many seconds for each target}
shift
out=$(mktemp -d "${TMPDIR:-/tmp}/pbkfs-fuzz.XXXXXX")
# Files that are made for each input are best not on a disk.
place=$(mktemp -d /dev/shm/pbkfs-fuzz.XXXXXX 2>/dev/null || mktemp -d "$out/place.XXXXXX")
trap 'rm -rf "$out" "$place"' EXIT
trap 'exit 130' INT TERM
mkdir -p build

flags="-std=c11 -g -O1 -fno-omit-frame-pointer -pthread -Wall -Wextra -fsanitize=address,undefined
       -fno-sanitize-recover=all -I$PWD/native/include -I$PWD/native/src -I$PWD/native/fuzz"
library=-lz
if printf '#include <libdeflate.h>\n' | clang -E -x c - -o /dev/null 2>/dev/null; then
    flags="$flags -DPBK_HAVE_LIBDEFLATE"
    library="-ldeflate -lz"
fi

# shellcheck disable=SC2086 # a list of words
find "$PWD/native/src" -name '*.c' | (cd "$out" && xargs -P "$(nproc)" -n 6 clang $flags -fsanitize=fuzzer-no-link -c)
ar cr "$out/core.a" "$out"/*.o

# shellcheck disable=SC2046 # a list of words
[ $# -gt 0 ] || set -- $(cd native/fuzz && ls fuzz_*.c | sed 's/^fuzz_//;s/\.c$//')
for name in "$@"; do
    (
        mkdir -p "$out/found"
        # shellcheck disable=SC2086 # lists of words
        clang $flags -fsanitize=fuzzer "native/fuzz/fuzz_$name.c" "$out/core.a" -o "$out/$name" $library
        set -- "$out/$name" -timeout=20 -rss_limit_mb=2048 -max_len=4096 -verbosity=0 -artifact_prefix=build/
        # Address space randomisation of newer kernels leaves older sanitizers no room.
        if setarch -R true 2>/dev/null; then set -- setarch -R "$@"; fi
        printf 'fuzz %s: ' "$name"
        TMPDIR=$place
        export TMPDIR
        if ! "$@" -max_total_time="$seconds" -print_final_stats=1 "$out/found" "native/fuzz/corpus/$name" \
            >"$out/log" 2>&1; then
            cat "$out/log"
            exit 1
        fi
        echo "$(sed -n 's/^stat::number_of_executed_units: *//p' "$out/log") inputs, ok"
        if [ -n "${FUZZ_KEEP:-}" ]; then
            mkdir -p "$FUZZ_KEEP/$name"
            "$@" -merge=1 "$FUZZ_KEEP/$name" "native/fuzz/corpus/$name" "$out/found" >"$out/log" 2>&1
        fi
        rm -rf "$out/found"
    )
done
