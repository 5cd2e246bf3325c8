# shellcheck shell=sh
# as-root.sh, to be sourced.

# as_root COMMAND ARG...: runs COMMAND as root, by sudo if the caller is another user. What sudo would drop
# goes along: the folders for what is kept and for what is temporary, and the proxies that apt reads from
# the environment.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        # By a shell: env takes a path with `=` for a variable.
        # shellcheck disable=SC2016 # for that shell
        sudo env ${HUSK_CACHE:+"HUSK_CACHE=$HUSK_CACHE"} ${TMPDIR:+"TMPDIR=$TMPDIR"} \
            ${http_proxy:+"http_proxy=$http_proxy"} ${https_proxy:+"https_proxy=$https_proxy"} \
            ${no_proxy:+"no_proxy=$no_proxy"} sh -c 'exec "$0" "$@"' "$@"
    else
        echo "cannot run $1 as root: there is no sudo here; install it, or run this as root" >&2
        return 1
    fi
}
