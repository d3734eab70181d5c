#!/usr/bin/env bash
# Brings a named text or GPT-2's ranks onto this machine, from a package by name, checked by hash. Run by corpora.mk.
#
#   data/fetch.sh debian PACKAGE FOLDER [VERSION SHA256]   unpacks the package into FOLDER
#   data/fetch.sh ranks FILE                               GPT-2's byte-pair ranks
set -euo pipefail

# A wheel that carries OpenAI's r50k_base.tiktoken; nothing of it is run.
readonly RANKS_PACKAGE=mlx-whisper==0.4.3 RANKS_PACKAGE_SHA256=6b82b6597a994643a3e5496c7bc229a672e5ca308458455bfe276e76ae024489
readonly RANKS_MEMBER=mlx_whisper/assets/gpt2.tiktoken RANKS_SHA256=306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930

fail() { echo "error: $*" >&2; exit 1; }
sha256() { sha256sum "$1" | cut -d' ' -f1; }

fetch_debian() {
  local package=$1 folder=$2 known_version=${3:-} known_sha256=${4:-}
  command -v apt-get >/dev/null || fail "$package: is a Debian package, and there is no apt-get here"
  echo "  downloading $package"
  # apt compares the file with the hash in Debian's signed index.
  (cd "$work" && { apt-get download -qq -o APT::Sandbox::User=root "$package" ||
    { apt-get update -qq && apt-get download -qq -o APT::Sandbox::User=root "$package"; }; }) >"$work/log" 2>&1 ||
    fail "$package: apt-get cannot download it: $(grep -m1 '^E:' "$work/log" || tail -n1 "$work/log")"
  local deb=("$work"/*.deb) version sum listed
  version=$(dpkg-deb -f "${deb[0]}" Version)
  sum=$(sha256 "${deb[0]}")
  listed=$(apt-cache show "$package=$version")
  grep -qx "SHA256: $sum" <<<"$listed" || fail "$package $version: SHA-256 $sum is not the one in apt's index"
  if [ "$version" = "$known_version" ]; then
    [ "$sum" = "$known_sha256" ] || fail "$package $version: SHA-256 $sum, must be $known_sha256"
  elif [ -n "$known_version" ]; then
    echo "  $package $version is not the recorded $known_version: checked by apt's signed index alone"
  fi
  dpkg-deb -x "${deb[0]}" "$work/unpacked"
  mkdir -p "$(dirname "$folder")" && rm -rf "$folder" && mv "$work/unpacked" "$folder"
  echo "  $package $version is in $folder (SHA-256 $sum)"
}

fetch_ranks() {
  local file=$1
  echo "$RANKS_PACKAGE --hash=sha256:$RANKS_PACKAGE_SHA256" >"$work/requirements.txt"
  "${PYTHON:-python3}" -m pip download -q --no-deps --only-binary :all: --require-hashes --disable-pip-version-check \
    -d "$work" -r "$work/requirements.txt" >"$work/log" 2>&1 || fail "GPT-2's ranks: pip cannot download $RANKS_PACKAGE: $(tail -n1 "$work/log")"
  "${PYTHON:-python3}" -m zipfile -e "$work"/*.whl "$work/wheel"
  local sum
  sum=$(sha256 "$work/wheel/$RANKS_MEMBER")
  [ "$sum" = "$RANKS_SHA256" ] || fail "GPT-2's ranks: SHA-256 $sum, must be $RANKS_SHA256"
  mkdir -p "$(dirname "$file")" && mv "$work/wheel/$RANKS_MEMBER" "$file"
  echo "  GPT-2's ranks are in $file"
}

mkdir -p downloads
work=$(mktemp -d downloads/.fetch.XXXXXX)
trap 'rm -rf "$work"' EXIT
case "${1:-} $#" in
  "debian 3" | "debian 5") fetch_debian "${@:2}" ;;
  "ranks 2") fetch_ranks "$2" ;;
  *) fail "usage: data/fetch.sh debian PACKAGE FOLDER [VERSION SHA256] | data/fetch.sh ranks FILE" ;;
esac
