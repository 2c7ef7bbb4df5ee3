/* Service worker: caches the page for offline use, and adds the headers that allow it to use several threads. */
'use strict';

const BUILD = "{{build}}";
const FILES = "{{files}}"; // name -> checksum
const PREFIX = `ufgir ${self.registration.scope} `;
const HEADERS = {
  'Cross-Origin-Opener-Policy': 'same-origin',
  'Cross-Origin-Embedder-Policy': 'require-corp',
  'Cross-Origin-Resource-Policy': 'same-origin',
};

const address = (name) => new URL(name, self.registration.scope).href;

function isolated(response, more = {}) {
  if (response.type === 'opaque' || response.type === 'opaqueredirect' || response.type === 'error') return response;
  const headers = new Headers(response.headers);
  for (const name of ['Content-Encoding', 'Content-Length']) headers.delete(name); // the body is already decompressed
  for (const [name, value] of Object.entries({...HEADERS, ...more})) headers.set(name, value);
  const empty = [101, 204, 205, 304].includes(response.status);
  return new Response(empty ? null : response.body, {status: response.status, statusText: response.statusText, headers});
}

async function older() {
  const names = (await caches.keys()).filter((name) => name.startsWith(PREFIX) && name !== PREFIX + BUILD);
  return Promise.all(names.map((name) => caches.open(name)));
}

async function keep(cache, before, name, checksum) {
  const url = address(name);
  for (const old of before) { // reuse files that have not changed
    const found = await old.match(url);
    if (found?.headers.get('X-Checksum') === checksum) return cache.put(url, found);
  }
  const response = await fetch(url, {integrity: checksum, cache: 'no-cache'});
  if (!response.ok) throw new Error(`${name}: ${response.status}`);
  return cache.put(url, isolated(response, {'X-Checksum': checksum}));
}

self.addEventListener('install', (event) => event.waitUntil((async () => {
  const cache = await caches.open(PREFIX + BUILD), before = await older();
  await Promise.all(Object.entries(FILES).map(([name, checksum]) => keep(cache, before, name, checksum)));
  await self.skipWaiting();
})()));

self.addEventListener('activate', (event) => event.waitUntil((async () => {
  for (const name of await caches.keys()) {
    if (name.startsWith(PREFIX) && name !== PREFIX + BUILD) await caches.delete(name);
  }
  await self.clients.claim();
})()));

self.addEventListener('fetch', (event) => {
  const request = event.request;
  if (request.method !== 'GET' || new URL(request.url).origin !== self.location.origin) return;
  event.respondWith((async () => {
    const cache = await caches.open(PREFIX + BUILD);
    const page = request.mode === 'navigate' && [address(''), address('index.html')].includes(request.url.split(/[?#]/)[0]);
    const found = await cache.match(page ? address('index.html') : request, {ignoreSearch: true});
    return found ?? isolated(await fetch(request));
  })());
});
