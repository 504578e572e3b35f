#!/usr/bin/env bash
# The tutorial as a stranger lives it: every command of docs/tutorial.md, in order, in an empty folder, with the
# agl-bench that is installed, and without a network. Prints each command, what it says, and its seconds.
#
#     pip install '.[test]' && benchmarks/story.sh
#
# Commands are the lines of ```sh blocks, and those that begin with "$ " in ```console blocks. The plug-in that it
# installs on the way is uninstalled at the end. Exit status: 1 if anything fails, 2 if it cannot be told here.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
refuse() { echo "story.sh: $1" >&2; exit 2; }
fail() { echo "story.sh: FAILED after $SECONDS s: $1" >&2; exit 1; }

# The same once more, inside a network of its own that has no way out, where the kernel allows it.
if [ "${STORY_NETWORK:-}" = "" ]; then
  STORY_NETWORK="none: AGL_BENCH_OFFLINE=1, and pip asks no index; the kernel does not let us cut it"
  export STORY_NETWORK
  if unshare -rn true 2>/dev/null; then
    STORY_NETWORK="cut by the kernel (unshare -rn)" exec unshare -rn bash "$0"
  fi
fi
if command -v ip >/dev/null; then ip link set lo up 2>/dev/null || true; fi # this machine may still talk to itself

export AGL_BENCH_OFFLINE=1 HF_HUB_OFFLINE=1 MLFLOW_DISABLE_TELEMETRY=true
export PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_QUIET=1
export PIP_NO_DEPS=1 PIP_NO_BUILD_ISOLATION=0 # what is needed is there; pip reads 0 as --no-build-isolation
unset AGL_BENCH_WORK AGL_BENCH_DATA AGL_BENCH_CACHE AGL_BENCH_STRICT_PLUGINS MLFLOW_TRACKING_URI

folder=$(mktemp -d)
cd "$folder"
program=$(command -v agl-bench) || refuse "there is no agl-bench on PATH; install it first: pip install '.[test]'"
bin=$(dirname "$program")
[ "$(dirname "$(command -v pip)")" = "$bin" ] || refuse "pip and agl-bench are not of one environment; activate that of $program"
home=$("$bin/python" -c 'import agl_bench, pathlib; print(pathlib.Path(agl_bench.__file__).resolve().parents[1])')
[ ! -e "$home/pyproject.toml" ] || refuse "agl_bench comes from the sources in $home; install the wheel, and unset PYTHONPATH"
trap 'cd /; "$bin/pip" uninstall -y agl-bench-kinship >/dev/null 2>&1 || true; rm -rf "$folder"' EXIT

commands() {
  awk '/^```(sh|console)$/ {kind = substr($0, 4); next}
       /^```/ {kind = ""; next}
       kind == "" || /^[[:space:]]*(#|$)/ {next}
       kind == "console" && held == "" && !sub(/^\$ /, "") {next}
       sub(/\\$/, "") {held = held $0; next}
       {print held $0; held = ""}' "$root/docs/tutorial.md" | tr -s ' '
}

echo "$("$program" --version), from ${home##*/}; network: $STORY_NETWORK"
told=0
while IFS= read -r -u 3 command; do
  printf '\n$ %s\n' "$command"
  started=$SECONDS
  eval "$command" 3<&- || fail "$command"
  printf '(%s s)\n' "$((SECONDS - started))"
  told=$((told + 1))
done 3< <(commands)

[ "$told" -ge 10 ] || fail "docs/tutorial.md has $told commands; a story has ten"
grep -q kinship agl-bench-work/report/report.html || fail "the report does not mention the selector"
"$program" list --json | grep -q '"provider": "agl-bench-kinship 0.1.0"' || fail "list does not show whose it is"
printf '\nA selector written, checked, run, reported, packed, installed and tested: %s commands, %s s\n' "$told" "$SECONDS"
