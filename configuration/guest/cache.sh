# shellcheck shell=sh
# cache.sh, to be sourced: sets and exports HUSK_CACHE, the absolute path of the folder that keeps what is
# made or fetched only once (default: ~/.cache/husk). A relative HUSK_CACHE is relative to the folder in
# which the script was started, so source this before changing to another.

HUSK_CACHE=${HUSK_CACHE:-${XDG_CACHE_HOME:-${HOME:?cannot find the cache folder: set HOME or HUSK_CACHE}/.cache}/husk}
case $HUSK_CACHE in /*) ;; *) HUSK_CACHE=$PWD/$HUSK_CACHE ;; esac
export HUSK_CACHE
