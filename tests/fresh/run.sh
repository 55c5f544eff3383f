#!/bin/sh
# Try this checkout as a new user would: on a bare Debian where nothing was prepared by hand.
#
#   tests/fresh/run.sh [--user] [--keep] SUITE [COMMAND ...]
#
# makes a minimal SUITE (bookworm, trixie, …) with debootstrap in a directory of its own, adds what a
# machine has (/proc, /sys, /dev/fuse, /dev/shm), clones HEAD there, and runs each COMMAND in the
# clone; without any: "./run demo" and then "./run test". --user runs them as an ordinary user with
# sudo, --keep leaves the directory. Needs root, debootstrap, and some 6 GB below $TMPDIR.
#
# The package managers inside are configured like those of this machine (apt's archive, pip, npm,
# certificates). Not a part of ./run test: it takes a quarter of an hour and downloads a lot.
set -eu

die() {
    printf 'fresh: %s\n' "$*" >&2
    exit 1
}
say() { printf 'fresh: %s\n' "$*" >&2; }

as=root keep=
while :; do
    case ${1:-} in
    --user) as=tester ;;
    --keep) keep=yes ;;
    -*) die "unknown option $1" ;;
    *) break ;;
    esac
    shift
done
suite=${1:?a suite of Debian, for example bookworm}
shift
[ $# -gt 0 ] || set -- "./run demo" "./run test"
[ "$(id -u)" = 0 ] || die "this needs root"
command -v debootstrap >/dev/null || die "this needs debootstrap"
checkout=$(cd "$(dirname "$0")/../.." && pwd)

archive=$(apt-get indextargets --format '$(REPO_URI)|$(LABEL)' 2>/dev/null |
    sed -n 's/|Debian$//p' | head -n 1)
[ -n "$archive" ] || archive=$(sed -n 's/^\(URIs:\|deb\) *\([^ ]*\/debian\)\/\{0,1\}\( .*\)\{0,1\}$/\2/p' \
    /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null | head -n 1)
[ -n "$archive" ] || die "no Debian archive is configured here"
archive=${archive%/}

root=$(mktemp -d "${TMPDIR:-/tmp}/pbkfs-fresh-$suite.XXXXXX")
chmod 755 "$root"

clean_up() {
    status=$?
    trap - EXIT INT TERM HUP
    # Processes that live inside would hold the mounts; they are nobody else's.
    for link in /proc/[0-9]*/root; do
        if [ "$(readlink "$link" 2>/dev/null)" = "$root" ]; then
            pid=${link#/proc/}
            pid=${pid%/root}
            say "left running: $pid $(tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null)"
            kill -9 "$pid" 2>/dev/null || :
            status=1
        fi
    done
    for point in $(awk -v r="$root" 'index($5, r) == 1 { print $5 }' /proc/self/mountinfo | sort -r); do
        case $point in "$root" | "$root/proc" | "$root/sys" | "$root/dev/shm") ;; *) say "left mounted: $point" && status=1 ;; esac
        umount "$point" || umount -l "$point"
    done
    if [ -n "$keep" ]; then
        say "kept: $root"
    else
        rm -rf --one-file-system "$root"
    fi
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT TERM HUP

say "debootstrap $suite into $root"
debootstrap --variant=minbase "$suite" "$root" "$archive" >"$root.log" 2>&1 || {
    tail -n 20 "$root.log" >&2
    die "debootstrap failed: $root.log"
}
rm -f "$root.log"

# --- what a machine has before its user comes --------------------------------------------------

mount --bind "$root" "$root" # a machine's root is a mount point
mount --make-private "$root"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mkdir -p "$root/dev/shm"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
[ -e "$root/dev/fuse" ] || mknod -m 666 "$root/dev/fuse" c 10 229
security=$(printf '%s' "$archive" | sed 's,/debian$,/debian-security,')
cat >"$root/etc/apt/sources.list" <<END
deb $archive $suite main
deb $archive $suite-updates main
deb $security $suite-security main
END
for file in /etc/resolv.conf /etc/hosts /etc/pip.conf /etc/npmrc \
    /root/.config/pip/pip.conf /root/.npmrc $(grep -l -i -r -E 'proxy|acquire' /etc/apt/apt.conf.d 2>/dev/null); do
    if [ -f "$file" ]; then
        mkdir -p "$root$(dirname "$file")"
        cp -L "$file" "$root$file"
    fi
done
# What pip is told to find in this machine's directories has to be there inside too.
for place in $(cat /etc/pip.conf /root/.config/pip/pip.conf 2>/dev/null | grep -o '\(file://\)\{0,1\}/[^ ]*' |
    sed 's,^file://,,' | grep -v '^/etc/' | cut -d / -f 1-3 | sort -u); do
    if [ -d "$place" ]; then mkdir -p "$root$place"; fi
done
settings=$(env | grep -i -E '^(PIP_[A-Z_]*|UV_[A-Z_]*|NPM_CONFIG_[A-Z_]*|[A-Z]*_PROXY|SSL_CERT_FILE|NODE_EXTRA_CA_CERTS)=' || :)

inside() { # USER COMMAND…
    who=$1
    shift
    home=/root
    [ "$who" = root ] || home=/home/$who
    # shellcheck disable=SC2086 # settings is a list of words without spaces
    chroot "$root" /usr/bin/setpriv --reuid="$who" --regid="$who" --init-groups \
        /usr/bin/env -i HOME=$home USER="$who" LOGNAME="$who" LANG=C.UTF-8 TERM=dumb ${CI:+CI=$CI} \
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin $settings "$@"
}

say "git, the one thing needed to clone"
inside root sh -c 'apt-get -q update && DEBIAN_FRONTEND=noninteractive \
    apt-get -q -y install --no-install-recommends git ca-certificates' >/dev/null
# A package of the suite has just written it; this machine's may hold the authority of a proxy.
cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
if [ "$as" != root ]; then
    inside root sh -c "DEBIAN_FRONTEND=noninteractive apt-get -q -y install --no-install-recommends sudo \
        && useradd -m -s /bin/bash $as && echo '$as ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/$as" >/dev/null
fi
home=/root
[ "$as" = root ] || home=/home/$as
git -C "$checkout" bundle create -q "$root/pbkfs.bundle" HEAD
inside "$as" git -c init.defaultBranch=main -c advice.detachedHead=false clone -q /pbkfs.bundle "$home/pbkfs"
rm "$root/pbkfs.bundle"
if [ -d "${PBKFS_TEST_CATALOGS:-$checkout/../shared/catalogs}" ]; then
    mkdir "$root$home/shared"
    cp -r "${PBKFS_TEST_CATALOGS:-$checkout/../shared/catalogs}" "$root$home/shared/catalogs"
fi

for command in "$@"; do
    say "$suite as $as: $command"
    begin=$(date +%s)
    inside "$as" sh -c "cd $home/pbkfs && $command" || die "failed on $suite: $command"
    say "$suite as $as: $command took $(($(date +%s) - begin)) s"
done
