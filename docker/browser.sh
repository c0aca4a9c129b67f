#!/bin/sh
# The browser in which the tests open the page of `asvr report`: Chromium and its driver from the system's packages.
# Installs them where they are missing and this user may; else says in one sentence what to do.
set -eu
command -v chromium >/dev/null 2>&1 && command -v chromedriver >/dev/null 2>&1 && exit 0
remedy="install them (Debian: apt-get install chromium chromium-driver)"
if ! command -v apt-get >/dev/null 2>&1; then
  echo "setup: chromium and chromedriver are missing, in which the tests open the report: $remedy." >&2; exit 9
fi
as_root=
if [ "$(id -u)" -ne 0 ]; then
  if ! sudo -n true 2>/dev/null; then
    echo "setup: chromium and chromedriver are missing, and only root can install them: ask for apt-get install chromium chromium-driver." >&2; exit 9
  fi
  as_root=sudo
fi
echo "setup: installing Chromium for the tests of the report"
{ $as_root apt-get update && $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium chromium-driver; } >/dev/null 2>&1 \
  || { echo "setup: chromium and chromedriver could not be installed: $remedy." >&2; exit 9; }
