#!/bin/sh
# sudo ./service.sh installs the service `edgeprune`: it answers over HTTP on port 8000, from boot on.
#
# /opt/edgeprune             the bundle and its virtual environment, which only root can change; the engines are the service's
# /etc/edgeprune/keys.txt    the API keys that are accepted, one a line
# /var/lib/edgeprune         this device's key and the builder's timing cache
# With DESTDIR, the files come below that folder, and nothing is started.
set -eu
umask 022
cd "$(dirname "$0")"
root="${DESTDIR:-}"
home="$root/opt/edgeprune"
keys="$root/etc/edgeprune/keys.txt"

if [ -z "$root" ] && ! id edgeprune >/dev/null 2>&1; then
    useradd --system --no-create-home --shell /usr/sbin/nologin edgeprune
fi
install -d "$home" "$root/etc/systemd/system"
rm -rf "$home/robot.bundle" # engines that another user built are not trusted
rm -f "$home"/edgeprune-*.whl
cp -R robot.bundle edgeprune-*.whl .env install.sh "$home"
rm -rf "$home/robot.bundle/engines"
chmod -R u=rwX,go=rX "$home"
"$home/install.sh"
install -d "$home/robot.bundle/engines"
if [ ! -f "$keys" ]; then
    install -d -m 700 "$(dirname "$keys")"
    (umask 077 && "$home/venv/bin/python" -c 'import secrets; print(secrets.token_urlsafe(32))' >"$keys")
fi
install -m 644 edgeprune.service "$root/etc/systemd/system/edgeprune.service"
if [ -n "$root" ]; then exit 0; fi

chown -R root:root "$home"
chown edgeprune: "$home/robot.bundle/engines"
systemctl daemon-reload
systemctl enable edgeprune
systemctl restart --no-block edgeprune
echo "Building engines, then listening on port 8000. See: journalctl --follow --unit edgeprune"
echo "The API key is in $keys."
