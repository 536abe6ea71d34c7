'use strict';
// The peer `node`: busboy, which streams files and hands fields over whole, and amqplib's confirm
// channel. One process; PORT and AMQP_* tell it where (see ../destination.py).

const { randomUUID } = require('node:crypto');
const http = require('node:http');
const { pipeline } = require('node:stream/promises');
const amqp = require('amqplib');
const busboy = require('busboy');

const MESSAGE_BYTES = 131064;
const WINDOW = 64;

const { AMQP_URL, AMQP_EXCHANGE, AMQP_ROUTING_KEY, AMQP_MANDATORY, PORT } = process.env;
const mandatory = AMQP_MANDATORY === 'true';

// Uploads by id: a returned message names its upload by its correlation id.
const uploads = new Map();

class Upload {
  constructor(channel) {
    this.channel = channel;
    this.id = randomUUID();
    this.messages = 0;
    this.unconfirmed = 0;
    this.failure = null;
    this.wake = () => {};
    uploads.set(this.id, this);
  }

  // Publishes when there is room in the window. Of an upload that has failed the rest is read and
  // dropped, so that its client gets to see the answer.
  async publish(name, body) {
    await this.until(WINDOW - 1);
    if (this.failure) return;
    this.unconfirmed += 1;
    const headers = { name, piece: this.messages };
    this.messages += 1;
    const options = { persistent: true, mandatory, correlationId: this.id, headers };
    this.channel.publish(AMQP_EXCHANGE, AMQP_ROUTING_KEY, body, options, (error) => {
      this.unconfirmed -= 1;
      if (error) this.failure ??= error;
      this.wake();
    });
  }

  async confirmed() {
    await this.until(0);
    if (this.failure) throw this.failure;
  }

  async until(most) {
    while (this.unconfirmed > most) {
      await new Promise((resolve) => { this.wake = resolve; });
    }
  }
}

// Bytes as they come, to pieces of the size of a message.
async function* inPieces(stream) {
  let held = [];
  let size = 0;
  for await (let data of stream) {
    while (size + data.length >= MESSAGE_BYTES) {
      const cut = MESSAGE_BYTES - size;
      held.push(data.subarray(0, cut));
      yield Buffer.concat(held, MESSAGE_BYTES);
      data = data.subarray(cut);
      held = [];
      size = 0;
    }
    if (data.length) {
      held.push(data);
      size += data.length;
    }
  }
  if (size) yield Buffer.concat(held, size);
}

async function publishStream(upload, name, stream) {
  for await (const piece of inPieces(stream)) await upload.publish(name, piece);
}

async function publishForm(upload, request) {
  // busboy's own limit of a field is 1 MiB, after which it cuts; here fields are uploads, too.
  const form = busboy({ headers: request.headers, limits: { fieldSize: Infinity } });
  // One part after the other: busboy waits for a file to be read before it goes on.
  let parts = Promise.resolve();
  const next = (name, stream) => {
    parts = parts.then(() => publishStream(upload, name, stream));
    parts.catch((error) => form.destroy(error));
  };
  form.on('file', next);
  form.on('field', (name, value) => next(name, [Buffer.from(value)]));
  await pipeline(request, form);
  await parts;
}

async function handle(channel, request, response) {
  const upload = new Upload(channel);
  try {
    const form = (request.headers['content-type'] ?? '').startsWith('multipart/form-data');
    await (form ? publishForm(upload, request) : publishStream(upload, '', request));
    await upload.confirmed();
    answer(response, 201, { messages: upload.messages });
  } catch (error) {
    answer(response, 502, { error: error.message });
  } finally {
    uploads.delete(upload.id);
  }
}

function answer(response, status, document) {
  response.writeHead(status, { 'Content-Type': 'application/json' });
  response.end(JSON.stringify(document));
}

async function main() {
  const connection = await amqp.connect(AMQP_URL);
  const channel = await connection.createConfirmChannel();
  // As most do: whatever ends the connection or the channel ends the process, and a supervisor
  // starts the next one.
  channel.on('error', (error) => { throw error; });
  connection.on('close', () => process.exit(1));
  // It comes before the message's confirm, which is an ack nevertheless.
  channel.on('return', (message) => {
    const upload = uploads.get(message.properties.correlationId);
    if (upload) upload.failure ??= new Error('unroutable');
  });
  const server = http.createServer((request, response) => {
    if (request.method === 'POST') handle(channel, request, response);
    else answer(response, 405, { error: 'POST only' });
  });
  // Node's own limit of five minutes for a whole request is for pages, not for uploads.
  server.requestTimeout = 0;
  server.listen(Number(PORT), '127.0.0.1');
}

main();
