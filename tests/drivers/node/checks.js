// What node-postgres must do: node checks.js URI PROXIED. Prints the name of each check that passed.
'use strict';
const assert = require('node:assert/strict');
const { pipeline } = require('node:stream/promises');
const { Readable } = require('node:stream');
const { Client, Pool } = require('pg');
const Cursor = require('pg-cursor');
const { from: copyFrom, to: copyTo } = require('pg-copy-streams');

const [uri, proxied] = [process.argv[2], process.argv[3] === 'proxied'];

async function connected(work, more = {}) {
  const client = new Client({ connectionString: uri, ...more });
  await client.connect();
  try {
    return await work(client);
  } finally {
    await client.end();
  }
}

const checks = {
  connects: () => connected(async (c) => {
    assert.equal((await c.query('SHOW application_name')).rows[0].application_name, 'checks');
  }, { application_name: 'checks' }),

  types: () => connected(async (c) => {
    const now = new Date('2024-02-29T01:02:03.004Z');
    const values = [['int', 5], ['float8', 1.5], ['bool', true], ['text', 'ü € 😀'], ['int8', '1152921504606846976'], ['numeric', '-1.50'], ['timestamptz', now],
      ['jsonb', { a: [1, null] }], ['int[]', [1, null, 3]], ['text[]', ['a', 'b,c']], ['bytea', Buffer.from([0, 255])], ['int', null]];
    for (const [type, value] of values) {
      assert.deepEqual((await c.query(`SELECT $1::${type} AS v`, [value])).rows[0].v, value);
    }
    assert.deepEqual((await c.query({ text: 'SELECT $1::int AS v, true AS b', values: [7], binary: true })).rows[0], { v: 7, b: true });
    assert.deepEqual((await c.query({ text: 'SELECT 1, 2', rowMode: 'array' })).rows, [[1, 2]]);
  }),

  transactions: () => connected(async (c) => {
    await c.query('CREATE TABLE t (n int PRIMARY KEY)');
    await c.query('BEGIN');
    await c.query('INSERT INTO t VALUES (1)');
    await assert.rejects(c.query('INSERT INTO t VALUES (1)'), (e) => e.code === '23505' && e.constraint === 't_pkey' && e.table === 't');
    await assert.rejects(c.query('SELECT 1'), (e) => e.code === '25P02');
    await c.query('ROLLBACK');
    assert.equal((await c.query('SELECT count(*) FROM t')).rows[0].count, '0');
  }),

  prepared: () => connected(async (c) => {
    for (let n = 0; n < 20; n++) {
      assert.equal((await c.query({ name: 'plus', text: 'SELECT $1::int + 1 AS n', values: [n] })).rows[0].n, n + 1);
    }
    assert.equal((await c.query('SELECT name FROM pg_prepared_statements')).rows[0].name, 'plus');
  }),

  queued: () => connected(async (c) => {
    const all = await Promise.all(Array.from({ length: 200 }, (_, n) => c.query('SELECT $1::int AS n', [n])));
    assert.deepEqual(all.map((r) => r.rows[0].n), Array.from({ length: 200 }, (_, n) => n));
    const mixed = await Promise.allSettled([c.query('SELECT 1 AS n'), c.query('SELECT 1/0'), c.query('SELEC'), c.query('SELECT $1', [2])]);
    assert.deepEqual(mixed.map((r) => r.status), ['fulfilled', 'rejected', 'rejected', 'fulfilled']);
    const several = await c.query('SELECT 1 AS a; SELECT 2 AS b, 3 AS c');
    assert.deepEqual(several.map((r) => r.rows), [[{ a: 1 }], [{ b: 2, c: 3 }]]);
  }),

  cursors: () => connected(async (c) => {
    const cursor = c.query(new Cursor('SELECT generate_series(1, $1::int) AS n', [20]));
    assert.equal((await cursor.read(7)).length, 7);
    assert.equal((await cursor.read(100)).length, 13);
    await cursor.close();
    const closed = c.query(new Cursor('SELECT generate_series(1, 1000) AS n'));
    await closed.read(3);
    await closed.close();
    assert.equal((await c.query('SELECT 1 AS n')).rows[0].n, 1);
  }),

  copy: () => connected(async (c) => {
    await c.query('CREATE TABLE c (n int, v text)');
    const lines = Array.from({ length: 20000 }, (_, n) => `${n}\tvalue ${n}\n`);
    await pipeline(Readable.from(lines), c.query(copyFrom('COPY c FROM STDIN')));
    let out = '';
    for await (const chunk of c.query(copyTo('COPY (SELECT * FROM c ORDER BY n) TO STDOUT'))) out += chunk;
    assert.equal(out, lines.join(''));
    await assert.rejects(pipeline(Readable.from(['x\ty\n']), c.query(copyFrom('COPY c FROM STDIN'))), (e) => e.code === '22P02');
    assert.equal((await c.query('SELECT count(*) FROM c')).rows[0].count, '20000');
  }),

  notifications: () => connected((listener) => connected(async (teller) => {
    const heard = new Promise((resolve) => listener.once('notification', resolve));
    await listener.query('LISTEN news');
    await teller.query("SELECT pg_notify('news', 'ü')");
    const { channel, payload, processId } = await heard;
    assert.deepEqual([channel, payload, processId], ['news', 'ü', teller.processID]);
    const notice = new Promise((resolve) => listener.once('notice', resolve));
    await listener.query("DO $$ BEGIN RAISE NOTICE 'hello'; END $$");
    assert.equal((await notice).message, 'hello');
  })),

  cancelling: () => connected(async (c) => {
    const running = assert.rejects(c.query('SELECT pg_sleep(60)'), (e) => e.code === '57014');
    await connected(async (observer) => {
      const asleep = "SELECT 1 FROM pg_stat_activity WHERE pid = $1 AND wait_event = 'PgSleep'";
      while ((await observer.query(asleep, [c.processID])).rowCount === 0) await new Promise((resolve) => setTimeout(resolve, 10));
    });
    const other = new Client({ connectionString: uri });
    const socket = other.connection;
    await new Promise((resolve, reject) => {
      socket.on('connect', () => socket.cancel(c.processID, c.secretKey));
      socket.on('error', reject);
      socket.stream.on('close', resolve);
      socket.connect(c.port, c.host);
    });
    await running;
    assert.equal((await c.query('SELECT 1 AS n')).rows[0].n, 1);
  }),

  errors: () => connected(async (c) => {
    await assert.rejects(c.query('SELECT 1, nosuch'), (e) => e.code === '42703' && e.position === '11');
    await assert.rejects(c.query('SELECT $1::int', ['x']), (e) => e.code === '22P02');
    await assert.rejects(new Client({ connectionString: uri.replace(/\/[^/]*$/, '/nosuch') }).connect(), (e) => e.code === '3D000');
  }),

  pool: async () => {
    const pool = new Pool({ connectionString: uri, max: 8 });
    const all = await Promise.all(Array.from({ length: 300 }, (_, n) => pool.query('SELECT $1::int AS n', [n])));
    assert.deepEqual(all.map((r) => r.rows[0].n), Array.from({ length: 300 }, (_, n) => n));
    await pool.end();
  },

  large: () => connected(async (c) => {
    const big = 'y'.repeat(10_000_000);
    assert.equal((await c.query('SELECT $1::text AS v', [big])).rows[0].v, big);
  }),

  workflow: () => connected(async (c) => {
    const text = proxied ? "SELECT df.start($1 ~> $2 |=> 'x') AS id" : "SELECT df.start(df.as(df.seq($1, $2), 'x')) AS id";
    const ids = new Set();
    for (let n = 0; n < 5; n++) ids.add((await c.query({ name: 'start', text, values: [`SELECT ${n}`, 'SELECT 2'] })).rows[0].id);
    assert.equal(ids.size, 5);
  }),
};

(async () => {
  for (const [name, check] of Object.entries(checks)) {
    await connected((c) => c.query('DROP SCHEMA scratch CASCADE; CREATE SCHEMA scratch'));
    await check();
    console.log('passed', name);
  }
  console.log('all', Object.keys(checks).length);
})().catch((e) => {
  console.error(e);
  process.exit(1);
});
