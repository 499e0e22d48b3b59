#!/bin/sh
# Deploys one model to the cluster that kubectl is connected to.
set -eu
here=$(cd "$(dirname "$0")" && pwd)

usage() {
    cat <<END
usage: $(basename "$0") OVERLAY [--dry-run] [--image IMAGE] [--namespace NAMESPACE]

OVERLAY is one of the models below, or the path of a directory with a kustomization of your own.
  --dry-run              print the manifests, change nothing
  --image IMAGE          image to run, with its registry and tag [text-gen-server:0, or :0-cuda]
  -n, --namespace NAME   namespace to deploy to [kubectl's current one]

models: $(known)
END
}

known() {
    (cd "$here/models" && echo *)
}

fail() {
    echo "$(basename "$0"): $1" >&2
    exit 2
}

value_of() { # flag, number of words left, value
    if [ "$2" -lt 2 ] || [ -z "$3" ]; then fail "$1: has no value"; fi
    echo "$3"
}

render() {
    if command -v kustomize >/dev/null; then
        kustomize build "$1"
    elif command -v kubectl >/dev/null; then
        kubectl kustomize "$1"
    else
        fail "neither kustomize nor kubectl is on the path"
    fi
}

overlay='' dry_run='' image='' namespace=''
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --dry-run) dry_run=yes ;;
        --image) image=$(value_of "$1" $# "${2-}"); shift ;;
        -n | --namespace) namespace=$(value_of "$1" $# "${2-}"); shift ;;
        -*) fail "$1: unknown option; --help lists all" ;;
        *)
            [ -z "$overlay" ] || fail "$1: one overlay at a time, and $overlay is given already"
            overlay=$1
            ;;
    esac
    shift
done

[ -n "$overlay" ] || fail "no overlay given; known: $(known)"
directory=$here/models/$overlay
case $overlay in */*) directory=$overlay ;; esac
[ -f "$directory/kustomization.yaml" ] || fail "unknown overlay '$overlay'; known: $(known)"
case $image in *[!A-Za-z0-9._:/@-]*) fail "--image: '$image' is no name of an image" ;; esac

manifests=$(render "$directory")
if [ -n "$image" ]; then
    manifests=$(printf '%s\n' "$manifests" | sed "s|image: text-gen-server:.*|image: $image|")
fi
if [ -n "$dry_run" ]; then
    printf '%s\n' "$manifests"
    exit 0
fi
command -v kubectl >/dev/null || fail "kubectl is not on the path; --dry-run prints the manifests"
printf '%s\n' "$manifests" | kubectl apply ${namespace:+--namespace "$namespace"} --filename -
