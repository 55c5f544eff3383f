#!/bin/sh
# The C core's own tests, without an interpreter: each program once under AddressSanitizer and UndefinedBehaviorSanitizer,
# once under ThreadSanitizer. Usage: run.sh [NAME…], for example: run.sh test_core
set -eu
cd "$(dirname "$0")/../.."

out=$(mktemp -d "${TMPDIR:-/tmp}/pbkfs-native-tests.XXXXXX")
trap 'rm -rf "$out"' EXIT
trap 'exit 130' INT TERM

cc=${CC:-cc}
flags="-std=c11 -g -O1 -fno-omit-frame-pointer -pthread -Wall -Wextra -Wconversion -Wshadow -Wvla
       -Inative/include -Inative/src"
library=-lz
if printf '#include <libdeflate.h>\n' | "$cc" -E -x c - -o /dev/null 2>/dev/null; then
    flags="$flags -DPBK_HAVE_LIBDEFLATE"
    library="-ldeflate -lz"
fi

# What a test needs beside itself. The dispatcher's brings its own nodes.
sources_of() {
    case $1 in
    test_dispatcher) ls native/src/dispatcher*.c native/src/fuse_*.c ;;
    *) ls native/src/*.c | grep -v -e /dispatcher -e /fuse_ ;;
    esac
}

# The calls that a test takes over.
wraps_of() {
    case $1 in
    test_power_cut) calls="pwritev_full pwrite_full ftruncate fdatasync fsync fallocate" ;;
    test_file) calls=fdatasync ;;
    *) return 0 ;;
    esac
    for call in $calls; do
        echo "-Wl,--wrap=pbk_$call"
    done
}

run() {
    name=$1
    kind=$2
    shift 2
    # shellcheck disable=SC2046,SC2086 # lists of words
    "$cc" $flags "$@" "native/tests/$name.c" $(sources_of "$name") $(wraps_of "$name") -o "$out/$name.$kind" $library
    printf '%s (%s): ' "$name" "$kind"
    (
        TMPDIR=$out
        ASAN_OPTIONS=detect_leaks=1:abort_on_error=1
        UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
        TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1
        export TMPDIR ASAN_OPTIONS UBSAN_OPTIONS TSAN_OPTIONS
        # Address space randomisation of newer kernels leaves older sanitizers no room.
        if setarch -R true 2>/dev/null; then
            exec setarch -R "$out/$name.$kind"
        fi
        exec "$out/$name.$kind"
    )
    echo ok
}

if [ $# -eq 0 ]; then
    set -- $(cd native/tests && ls test_*.c | sed 's/\.c$//')
fi
for test in "$@"; do
    run "$test" asan -fsanitize=address,undefined -fno-sanitize-recover=all
    # One thread has no races, and the played power cuts take minutes under ThreadSanitizer.
    [ "$test" = test_power_cut ] || run "$test" tsan -fsanitize=thread
done
