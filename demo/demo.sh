#!/bin/sh
# The demonstration behind ./run demo: a backup becomes a writable server, and stays as it was.
# Uses nothing but the command line of pbkfs and PostgreSQL's own programs, works as root and as an
# ordinary user, and leaves nothing behind.
set -eu
checkout=$(cd "$(dirname "$0")/.." && pwd)
PATH=$checkout/.venv/bin:$PATH

if [ -t 1 ]; then bold=$(printf '\033[1m') dim=$(printf '\033[2m') plain=$(printf '\033[0m'); else bold='' dim='' plain=''; fi

title() { printf '\n%s== %s%s\n' "$bold" "$*" "$plain"; }
note() { printf '   %s\n' "$*"; }
say_command() { printf '%s$ %s%s\n' "$bold" "$*" "$plain"; }
# Run a command, its output set off from ours.
run() {
    "$@" >"$work/output" 2>&1 || {
        sed 's/^/   /' "$work/output"
        printf 'the demo failed at: %s\n' "$*" >&2
        exit 1
    }
    sed 's/^/   /' "$work/output"
}
show() {
    say_command "$*"
    run "$@"
}

# --- PostgreSQL's programs, and the user who may run them ------------------------------------

has_all() {
    for program in initdb pg_ctl pg_basebackup psql pgbench; do
        [ -x "$1/$program" ] || return 1
    done
}

find_bindir() {
    for major in 18 17 16 15 14; do
        for place in "/usr/lib/postgresql/$major/bin" "/usr/pgsql-$major/bin" \
            "${PBKFS_TEST_POSTGRES:-/var/tmp/pbkfs-tests/pg}/$major/bin"; do
            if has_all "$place" && { [ -O "$place" ] || [ "$(stat -L -c %u "$place")" = 0 ]; }; then
                echo "$place"
                return
            fi
        done
    done
    "$checkout/.venv/bin/python" "$checkout/tests/get_postgres.py" 17
}

bindir=$(find_bindir)
PATH=$bindir:$PATH
PBKFS_PG_BINDIR=$bindir
export PATH PBKFS_PG_BINDIR

user=$(id -un)
if [ "$(id -u)" = 0 ]; then # a server refuses to run as root
    if id postgres >/dev/null 2>&1; then user=postgres; else user=nobody; fi
fi
as_user() {
    if [ "$(id -u)" = 0 ]; then
        setpriv --reuid="$(id -u $user)" --regid="$(id -g $user)" --clear-groups -- "$@"
    else
        "$@"
    fi
}

# --- the place, and how it is left -----------------------------------------------------------

began=$(date +%s)
work=$(mktemp -d "${TMPDIR:-/tmp}/pbkfs-demo.XXXXXX")
chmod 755 "$work"
cd "$work"
mkdir source socket backup mnt
if [ "$(id -u)" = 0 ]; then chown "$user" source socket backup; fi

clean_up() {
    status=$?
    trap - EXIT INT TERM HUP
    if [ -e source/postmaster.pid ]; then
        as_user pg_ctl -D source -m immediate stop >/dev/null 2>&1 || :
    fi
    if mountpoint -q mnt; then
        pbkfs stop -D mnt -m immediate >/dev/null 2>&1 || :
        pbkfs unmount -D mnt --force >/dev/null 2>&1 || :
    fi
    cd /
    rm -rf "$work"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT TERM HUP

size_of() { du -sh "$@" | cut -f 1; }
sum_of() { (cd "$1" && find . -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum | cut -c 1-16); }

# --- the story -------------------------------------------------------------------------------

start() {
    say_command "pbkfs start -D mnt"
    uri=$(pbkfs start -D mnt)
    note "$uri"
}
sql() {
    say_command "psql -c \"$1\""
    run psql -X -q -P footer=off -d "$uri" -c "$1"
}

title "1. A cluster, and a backup of it"
note "$(postgres --version), run by $user; everything is below $work"
as_user initdb -D source -U postgres -A trust --no-sync --locale=C -E UTF8 >/dev/null
as_user pg_ctl -w -D source -l socket/server.log \
    -o "-k $work/socket -c listen_addresses= -c fsync=off" start >/dev/null
as_user pgbench -h "$work/socket" -U postgres -q -i -s 10 postgres >/dev/null 2>&1
say_command "pg_basebackup -D backup"
as_user pg_basebackup -h "$work/socket" -U postgres -D backup -c fast --no-sync
as_user pg_ctl -D source -m fast stop >/dev/null
rm -rf source socket
before=$(sum_of backup)
note "the backup has $(size_of backup); sha256 over all of its files: $before"
note "the cluster itself is gone now: the backup is all there is"

title "2. The backup is mounted: no restore, no copy"
show pbkfs mount --base backup -D mnt -d diff --owner "$user" --wait
show ls -C mnt
note "the diff, which takes all changes, has $(size_of diff)"

title "3. PostgreSQL runs on it"
start
sql "select count(*) as accounts, sum(abalance) as balance from pgbench_accounts"

title "4. Data changes"
sql "update pgbench_accounts set abalance = abalance + 1 where aid <= 1000"
sql "create table note as select 1 as id, 'written on a backup' as text"
sql "checkpoint"
note "what that cost:"
say_command "pbkfs stat -D mnt | head -n 6"
pbkfs stat -D mnt >statistics
run head -n 6 statistics
show du -sh backup diff
show du -sh diff/objects diff/pg_wal

title "5. The backup was not touched"
after=$(sum_of backup)
note "sha256 before: $before"
note "sha256 now:    $after"
[ "$before" = "$after" ] || {
    echo "the backup changed" >&2
    exit 1
}

title "6. Stopped, unmounted, mounted again: the change is still there"
show pbkfs stop -D mnt
show pbkfs unmount -D mnt
show pbkfs mount -D mnt -d diff --wait
start
sql "select * from note"
sql "select sum(abalance) as balance from pgbench_accounts"
[ "$(psql -X -A -t -d "$uri" -c 'select sum(abalance) from pgbench_accounts')" = 1000 ]

title "7. Cleaned up"
show pbkfs stop -D mnt
show pbkfs unmount -D mnt
show pbkfs cleanup -d diff
[ "$(sum_of backup)" = "$before" ]
note "the backup still has sha256 $before"
note "done in $(($(date +%s) - began)) s"
