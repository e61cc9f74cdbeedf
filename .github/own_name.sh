#!/usr/bin/env bash
# Puts the name of a copy on GitHub where OWNER/normlab stands, in badges, first cells and commands:
# bash .github/own_name.sh jane/norms
set -euo pipefail
cd "$(dirname "$0")/.."
[[ ${1:-} =~ ^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$ ]] || { echo "give owner/repository, such as jane/norms" >&2; exit 2; }
{ grep -rlF OWNER/normlab README.md notebooks --include='*.md' --include='*.ipynb' || true; } |
  while read -r file; do sed -i.before "s#OWNER/normlab#$1#g" "$file"; rm "$file.before"; done
